"""Which rows to run together: those of like length, and never one that has no other beside it."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


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


def partnered(items: Sequence[T], size: int) -> list[list[T]]:
    """Batches of `size`, and at the end of one more rather than a single item, which has no other beside it."""
    batches = [list(items[i : i + size]) for i in range(0, len(items), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches
