"""Which rows of unequal length to run together."""

from collections.abc import Iterator, Sequence


def padded_groups(sizes: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of `sizes`, the longest first, in groups whose padded size stays within `tokens` (at least one
    row each)."""
    group: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        if group and sizes[group[0]] * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
