"""What a method makes of a document: text, keys and values, a soft prompt, a patch, or several of them at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.layout import Tokens
from hyperlora.patch import Patch
from hyperlora.shared_state import SharedState


@dataclass(frozen=True)
class KV:
    """Keys and values of the tokens that a method kept, for the prompt up to the end of the context.

    Attributes:
        keys, values: per layer (kv_heads, kept, head_dim), as computed at `positions`.
        places, positions: (kept,) place in the sequence and absolute position of every kept token.
        next_place, next_position: where the prompt goes on, as if nothing had been dropped.
        prefix: how many of the first rows are the prompt's prefix, which all documents have.
        following: logits (vocabulary,) of the token after the context, so that text can follow at once; None where a
            method does not give them.
    """

    keys: list[Tensor] = field(repr=False)
    values: list[Tensor] = field(repr=False)
    places: Tensor = field(repr=False)
    positions: Tensor = field(repr=False)
    next_place: int
    next_position: int
    prefix: int = 0
    following: Tensor | None = field(default=None, repr=False)

    @property
    def elements(self) -> int:
        """Numbers held for this document: not those of the prefix."""
        return sum(tensor[:, self.prefix :].numel() for tensor in (*self.keys, *self.values))

    def select(self, kept: Tensor) -> KV:
        """The same without the rows for which `kept` (rows,) is False; those of the prefix stay."""
        kept = kept.clone()
        kept[: self.prefix] = True
        return replace(
            self,
            keys=[keys[:, kept] for keys in self.keys],
            values=[values[:, kept] for values in self.values],
            places=self.places[kept],
            positions=self.positions[kept],
        )


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

    def resident_bytes(self, base: BaseModel) -> int:
        """Bytes held while a question is answered, at 16 bits a number: a slot token costs its K/V, if they survive
        the slot."""
        soft = 0 if self.soft is None else len(self.soft)
        if self.shared is not None and self.shared.rule is not None:
            tokens = Tokens(self.text, range(len(self.text)), len(self.text))
            text = int(self.shared.rule(tokens).kept.sum())
        else:
            text = len(self.text)
        kv = 0 if self.kv is None else self.kv.elements
        patch = 0 if self.patch is None else self.patch.elements
        return (text + soft) * base.kv_bytes_per_token + 2 * (kv + patch)

    def stored_bytes(self, base: BaseModel) -> int:
        """Bytes to be kept on disk for the document: text as UTF-8, numbers at 16 bits."""
        text = len(base.tokenizer.decode(list(self.text)).encode())
        soft = 0 if self.soft is None else self.soft.numel()
        kv = 0 if self.kv is None else self.kv.elements
        patch = 0 if self.patch is None else self.patch.elements
        return text + 2 * (soft + kv + patch)
