"""Which rows to run together: those of like length, and never one that has no other beside it."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
# By kind of device: padded tokens that one pass takes at most, and what a pass costs beside them, in tokens.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
_PASS_TOKENS = {"cpu": 64, "cuda": 16384}


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


def cheapest_groups(sizes: Sequence[int], device: torch.device, tokens: int | None = None) -> list[list[int]]:
    """Numbers of rows of `sizes`, the longest first, in the groups that cost least on a device: a group's cost is its
    padded size, and some more for the pass.

    Args:
        tokens: of padded size at most, unless a row has more; default `BATCH_TOKENS`.
    """
    limit = tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    each = _PASS_TOKENS.get(device.type, _PASS_TOKENS["cpu"])
    order = sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))
    costs, starts = [0], [0]  # of the cheapest groups of the first rows, and where the last of these groups begins
    for end in range(1, len(order) + 1):
        found = []
        for start in range(end - 1, -1, -1):
            padded = sizes[order[start]] * (end - start)
            if padded > limit and end - start > 1:
                break
            found.append((costs[start] + padded + each, start))
        cost, start = min(found)
        costs.append(cost)
        starts.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(order[starts[end] : end])
        end = starts[end]
    return groups[::-1]


def partnered(items: Sequence[T], size: int) -> list[list[T]]:
    """Batches of `size`, and at the end of one more rather than a single item, which has no other beside it."""
    batches = [list(items[i : i + size]) for i in range(0, len(items), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches
