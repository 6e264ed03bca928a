"""The document's keys and values, computed once: what plain prefix caching does."""

from collections.abc import Sequence
from typing import ClassVar

from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method
from hyperlora.prompt import document_ids
from hyperlora.runtime import Runtime


class KVCache(Method):
    """Every layer's keys and values of the prompt up to the end of the document."""

    name = "kv_cache"
    rival: ClassVar[str | None] = "cached KV"
    revision = 2

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        texts = [Memory(text=tuple(document_ids(self.base.tokenizer, document.text))) for document in documents]
        return Runtime(self.base).prefill(texts)
