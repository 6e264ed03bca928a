"""A cache of keys and values with room to grow: a decoded token is written in its place, and nothing else is copied."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_MORE = 64  # tokens of room at least


class GrowingLayer(DynamicLayer):
    """A layer's `keys` and `values` (rows, kv_heads, tokens, head_dim) as the front of larger buffers.

    The library's own layer joins the old and the new into a new tensor at every token. Whatever is assigned to `keys`
    and `values` is kept as it is and moved to a buffer when it has to grow.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # a buffer that is written to again has no gradient
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _grown(self.keys, key_states), _grown(self.values, value_states)
        return self.keys, self.values


def growing_cache() -> Cache:
    return Cache(layer_class_to_replicate=GrowingLayer)


def _grown(held: Tensor | None, new: Tensor) -> Tensor:
    """`held` with `new` behind it, in the storage of `held` if there is room."""
    if held is None or not held.numel():
        held = new[:, :, :0]
    rows, heads, tokens, width = new.shape
    before = held.shape[2]
    room = held.stride(1) // width  # tokens of the buffer that `held` is the front of
    size = rows * heads * room * width * held.element_size()
    if 0 < before <= room - tokens and held.untyped_storage().nbytes() == size:
        buffer = held.as_strided((rows, heads, room, width), (heads * room * width, room * width, width, 1))
    else:
        buffer = new.new_empty(rows, heads, before + tokens + max(_MORE, (before + tokens) // 8), width)
        buffer[:, :, :before] = held
    buffer[:, :, before : before + tokens] = new
    return buffer[:, :, : before + tokens]
