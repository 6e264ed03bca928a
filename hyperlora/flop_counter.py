"""Torch's counter of floating-point operations, which knows CUDA's attention kernels, taught those of the CPU."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """Counts the matrix products and the attention inside its block, backward passes included."""
    aten = torch.ops.aten
    unknown = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=unknown)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """From shapes (batch, heads, tokens, head_dim): two matrix products."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """The scores are computed again, and both products have two gradients: five products in all."""
    return 5 * _attention(query, key, value) // 2
