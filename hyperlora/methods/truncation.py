"""As many of the document's tokens as another method's memory would pay for."""

from collections.abc import Sequence
from typing import Literal

from hyperlora.base_model import BaseModel
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method, MethodSettings
from hyperlora.prompt import document_ids


class Truncation(Method):
    """The document's start, its end, or half of each, at the resident bytes of another method."""

    name = "truncation"
    budgeted = True

    class Settings(MethodSettings):
        """`side`: what is kept."""

        side: Literal["head", "tail", "both"] = "head"

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        assert budgets is not None
        memories = []
        for document, budget in zip(documents, budgets, strict=True):
            ids, count = document_ids(self.base.tokenizer, document.text), token_budget(self.base, budget)
            head = {"head": count, "tail": 0, "both": (count + 1) // 2}[self.settings.side]
            kept = ids if count >= len(ids) else ids[:head] + ids[len(ids) - (count - head) :]
            memories.append(Memory(text=tuple(kept)))
        return memories


def token_budget(base: BaseModel, budget: int) -> int:
    """Context tokens whose K/V at 16 bits take at most `budget` bytes."""
    return budget // base.kv_bytes_per_token
