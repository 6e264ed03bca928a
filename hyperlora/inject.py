"""Apply LoRA factors to a frozen model, one per example, with gradient, for as long as a `with` block lasts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.fingerprint import fingerprint
from hyperlora.patch import Patch

# Per module path: A (documents, rank, d_in) and B (documents, d_out, rank), or one of each for all documents; the scale
# is folded in.
Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass
class TokenGate:
    """Says at which tokens an injected adapter acts: `value` (batch, tokens) scales it in the next forward pass, None
    lets it act everywhere. A gated adapter cannot be merged into the weights (CCM, Kim et al. 2024)."""

    value: Tensor | None = None


@contextmanager
def inject(
    model: nn.Module, factors: Factors, rows: Tensor | None = None, gate: TokenGate | None = None
) -> Iterator[None]:
    """Add `B A x` to the output of every named module inside the block.

    Args:
        factors: per module path, for a batch of documents, or one that is the same for all of them.
        rows: (batch,) the document of each example. Default: the examples of a document stand together, equally
            many for each. Beam search repeats each example, and its rows with it.
        gate: at which tokens the factors act; default everywhere.

    With activation checkpointing, call `backward()` inside the block: the layers run again there and must find the
    same patch.
    """
    examples = 1
    if rows is not None:
        blocks, counts = torch.unique_consecutive(rows, return_counts=True)
        # Neighbours share one copy of their document's factors where that gives blocks of equal size.
        order = blocks if bool((counts == counts[0]).all()) else rows
        factors = {path: (a, b) if len(a) == 1 else (a[order], b[order]) for path, (a, b) in factors.items()}
        examples = len(rows)
    handles = [
        model.get_submodule(path).register_forward_hook(_adder(a, b, examples, gate))
        for path, (a, b) in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(a: Tensor, b: Tensor, examples: int, gate: TokenGate | None) -> Any:
    def add(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0]  # (batch, tokens, d_in)
        if x.shape[0] % a.shape[0] or x.shape[0] % examples:
            raise ValueError(
                f"{x.shape[0]} examples cannot be shared out among {max(examples, a.shape[0])} patches; pass `rows`"
            )
        # The product is small and matters: keep it in the factors' precision, which may be higher than the model's.
        blocks = x.to(a.dtype).reshape(a.shape[0], -1, x.shape[-1])
        delta = torch.bmm(torch.bmm(blocks, a.mT), b.mT)
        delta = delta.reshape(output.shape)
        if gate is not None and gate.value is not None:
            delta = delta * gate.value[..., None].to(delta.dtype)
        return output + delta.to(output.dtype)

    return add


@contextmanager
def patched(model: nn.Module, patch: Patch | Sequence[Patch], rows: Tensor | None = None) -> Iterator[nn.Module]:
    """The model with a patch, or with one patch per example, inside the block.

    Args:
        rows: see `inject`.

    Raises:
        BaseMismatch: a patch was made for another base.
    """
    patches = [patch] if isinstance(patch, Patch) else list(patch)
    device, found = next(model.parameters()).device, fingerprint(model)
    for one in patches:
        one.check(model, found)
    with inject(model, stack_patches(patches, device), rows):
        yield model


def stack_patches(patches: Sequence[Patch | None], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors for `inject`: patches of any ranks and modules (None: of no effect) side by side, in float32."""
    parts = [patch.factors if patch is not None else {} for patch in patches]
    paths = sorted({path for part in parts for path in part})
    return {path: _joined([part.get(path) for part in parts], device) for path in paths}


def _joined(pairs: list[tuple[Tensor, Tensor] | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack the factors of several patches on one module, filled up with zeros to the largest rank."""
    present = next(pair for pair in pairs if pair is not None)
    rank = max(pair[0].shape[0] for pair in pairs if pair is not None)
    a = present[0].new_zeros(len(pairs), rank, present[0].shape[1])
    b = present[1].new_zeros(len(pairs), present[1].shape[0], rank)
    for index, pair in enumerate(pairs):
        if pair is not None:
            a[index, : pair[0].shape[0]] = pair[0]
            b[index, :, : pair[1].shape[1]] = pair[1]
    return a.to(device).float(), b.to(device).float()
