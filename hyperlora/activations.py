"""What the layers of a frozen model keep for the backward pass: their inputs alone, or all of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from hyperlora.structure import decoder_layers


def checkpoint_layers(model: Any) -> None:
    """Have a frozen model's layers keep their inputs only and run again in the backward pass.

    Transformers does so in training mode, which the layers alone are put into: what is inside them stays as it is, and
    the dropout that some apply by themselves is none.
    """
    kept = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kept)
    else:  # its name in older versions of transformers
        model.gradient_checkpointing_enable(kept)
    for block in decoder_layers(model)[1]:
        block.training = True
        for name, value in vars(block).items():
            if "dropout" in name and isinstance(value, float):
                setattr(block, name, 0.0)


@contextmanager
def stored(blocks: Sequence[nn.Module] | nn.ModuleList) -> Iterator[None]:
    """Inside the block the layers `blocks` keep their activations, whatever `checkpoint_layers` has said: one that ran
    again in the backward pass would do so without an adapter that was on, and transformers decodes without keys and
    values where layers are checkpointed, in some versions also where there is no gradient."""
    before = [block.training for block in blocks]
    try:
        for block in blocks:
            block.training = False
        yield
    finally:
        for block, training in zip(blocks, before, strict=True):
            block.training = training
