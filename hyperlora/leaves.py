"""Factors cut off from the graph that made them, so that each loss can run backward by itself and the graph once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hyperlora.inject import Factors


def leaves_of(factors: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B as leaves that gather the gradients of losses."""
    return {path: (a.detach().requires_grad_(), b.detach().requires_grad_()) for path, (a, b) in factors.items()}


def joined(factors: Factors, leaves: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """A scalar whose gradient behind `factors` is the one that their `leaves` have gathered."""
    ends = [pair for path in factors for pair in zip(factors[path], leaves[path], strict=True)]
    return torch.stack([(end * leaf.grad).sum() for end, leaf in ends if leaf.grad is not None]).sum()
