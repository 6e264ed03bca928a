from hyperlora.groups import padded_groups


def test_rows_of_like_length_run_together_and_none_is_left_out() -> None:
    sizes = [3, 10, 4, 4, 25, 1]
    found = list(padded_groups(sizes, 12))
    assert found == [[4], [1], [2, 3, 0], [5]]
    assert list(padded_groups([], 12)) == []
