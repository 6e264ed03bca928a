"""Which of PyTorch's attention kernels a pass with a gradient runs on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperlora.base_model import BaseModel

# Without cuDNN's, which plans anew for every shape: a third of a step where every batch has another.
TRAINING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_SHORT = 160  # tokens


def attention(base: BaseModel, tokens: int) -> AbstractContextManager[None]:
    """Inside the block a pass over sequences of `tokens` and the way back through it run on the faster kernel.

    On a CPU the fused kernel walks back through short sequences in bfloat16 more slowly than plain products in float32
    do (`eval/bench/attention.py`); through long ones it is the faster one, and in float32 through all.
    """
    short = base.device.type == "cpu" and base.model.dtype == torch.bfloat16 and tokens <= _SHORT
    return sdpa_kernel([SDPBackend.MATH]) if short and torch.is_grad_enabled() else nullcontext()
