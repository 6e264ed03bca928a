"""What a method makes of a document: text, keys and values, a soft prompt, a patch, or several of them at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.patch import Patch
from hyperlora.shared_state import SharedState


@dataclass(frozen=True)
class KV:
    """Keys and values of the tokens that a method kept, for the prompt up to the end of the context.

    Attributes:
        keys, values: per layer (kv_heads, kept, head_dim), as computed at `positions`.
        places, positions: (kept,) place in the sequence and absolute position of every kept token.
        next_place, next_position: where the prompt goes on, as if nothing had been dropped.
    """

    keys: list[Tensor] = field(repr=False)
    values: list[Tensor] = field(repr=False)
    places: Tensor = field(repr=False)
    positions: Tensor = field(repr=False)
    next_place: int
    next_position: int

    @property
    def elements(self) -> int:
        return sum(tensor.numel() for tensor in (*self.keys, *self.values))


@dataclass(frozen=True)
class Memory:
    """A document as a method remembers it; parts that are None or empty are not there.

    Attributes:
        text: token ids in the prompt's context slot.
        soft: input embeddings (tokens, d_model) in the slot.
        kv: keys and values of prompt prefix and slot.
        patch: LoRA factors.
        shared: what the method uses for every document.
    """

    text: tuple[int, ...] = field(default=(), repr=False)
    soft: Tensor | None = field(default=None, repr=False)
    kv: KV | None = None
    patch: Patch | None = None
    shared: SharedState | None = None

    def with_text(self, ids: list[int]) -> Memory:
        """The same memory with a document in the prompt, to see what it does to reading."""
        return replace(self, text=tuple(ids), soft=None, kv=None)

    def resident_bytes(self, base: BaseModel, itemsize: int = 2) -> int:
        """Bytes held while a question is answered, at `itemsize` bytes a number: a slot token costs its K/V."""
        slot = len(self.text) + (0 if self.soft is None else len(self.soft))
        per_token = base.kv_bytes_per_token // base.model.dtype.itemsize
        kv = 0 if self.kv is None else self.kv.elements
        patch = 0 if self.patch is None else self.patch.elements
        return itemsize * (slot * per_token + kv + patch)

    def stored_bytes(self, base: BaseModel, itemsize: int = 2) -> int:
        """Bytes to be kept on disk for the document: text as UTF-8, numbers at `itemsize` bytes."""
        text = len(base.tokenizer.decode(list(self.text)).encode())
        soft = 0 if self.soft is None else self.soft.numel()
        kv = 0 if self.kv is None else self.kv.elements
        patch = 0 if self.patch is None else self.patch.elements
        return text + itemsize * (soft + kv + patch)
