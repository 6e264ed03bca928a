"""Keys and values that grow in place."""

import torch
from transformers import DynamicCache

from hyperlora.growing_cache import growing_cache


def test_a_growing_cache_holds_what_the_joined_one_holds() -> None:
    """Over a long decode, with rows freed on the way; tokens are not copied as long as there is room."""
    torch.manual_seed(0)
    ours, theirs, places = growing_cache(), DynamicCache(), set()
    with torch.no_grad():
        for step in range(150):
            new = torch.randn(2, 2, 3, 5 if step in (0, 40) else 1, 4)  # keys and values
            for cache in (ours, theirs):
                held = cache.update(*new, 0)
            assert all(torch.equal(a, b) for a, b in zip(ours.update(*new, 1), theirs.update(*new, 1), strict=True))
            places.add(ours.layers[0].keys.data_ptr())
            assert torch.equal(ours.layers[0].keys, held[0]) and torch.equal(ours.layers[0].values, held[1])
            if step == 60:
                for cache in (ours, theirs):
                    for layer in cache.layers:
                        index = torch.tensor([0, 3, 7])[None, None, :, None].expand(2, 3, -1, 4)
                        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
                assert ours.layers[0].keys.untyped_storage().nbytes() == 2 * 3 * 3 * 4 * 4  # freed for good
    assert ours.get_seq_length() == theirs.get_seq_length() == 3 + 89
    assert len(places) <= 4


def test_a_growing_cache_carries_gradients() -> None:
    cache = growing_cache()
    first, second = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 1, 4, requires_grad=True)
    cache.update(first, first, 0)
    keys, values = cache.update(second, second, 0)
    (keys * values).sum().backward()
    torch.testing.assert_close(first.grad, 2 * first.detach())
    torch.testing.assert_close(second.grad, 2 * second.detach())
