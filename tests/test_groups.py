from itertools import combinations

import pytest
import torch

from hyperlora.groups import _PASS_TOKENS, BATCH_TOKENS, cheapest_groups, padded_groups


def test_rows_of_like_length_run_together_and_none_is_left_out() -> None:
    sizes = [3, 10, 4, 4, 25, 1]
    found = list(padded_groups(sizes, 12))
    assert found == [[4], [1], [2, 3, 0], [5]]
    assert list(padded_groups([], 12)) == []


def by_trial(sizes: list[int], limit: int, each: int) -> int:
    """The least cost of any way to cut the sorted sizes into groups."""
    ordered, costs = sorted(sizes, reverse=True), []
    for count in range(len(sizes)):
        for cuts in combinations(range(1, len(sizes)), count):
            groups = [ordered[a:b] for a, b in zip((0, *cuts), (*cuts, len(sizes)), strict=True)]
            if all(len(group) == 1 or group[0] * len(group) <= limit for group in groups):
                costs.append(sum(group[0] * len(group) + each for group in groups))
    return min(costs)


@pytest.mark.parametrize(("limit", "each"), [(2048, 64), (600, 64), (300, 0), (40, 64), (2048, 1000)])
def test_groups_cost_as_little_as_they_can(monkeypatch: pytest.MonkeyPatch, limit: int, each: int) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", limit)
    monkeypatch.setitem(_PASS_TOKENS, "cpu", each)
    for sizes in ([272, 173, 28, 145, 144, 104, 67, 46], [50] * 7, [300, 1], [5]):
        groups = cheapest_groups(sizes, torch.device("cpu"))
        assert sorted(number for group in groups for number in group) == list(range(len(sizes)))
        padded = [max(sizes[number] for number in group) * len(group) for group in groups]
        assert all(size <= limit or len(group) == 1 for size, group in zip(padded, groups, strict=True))
        assert sum(padded) + each * len(groups) == by_trial(sizes, limit, each)
    assert cheapest_groups([], torch.device("cpu")) == []


def test_a_gpu_runs_fewer_and_larger_groups() -> None:
    sizes = [400, *[60] * 30]
    assert len(cheapest_groups(sizes, torch.device("cuda"))) == 1 < len(cheapest_groups(sizes, torch.device("cpu")))
