"""The whole document in the prompt: what every other method is measured against."""

from collections.abc import Sequence

from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method
from hyperlora.prompt import document_ids


class Full(Method):
    """The document in the prompt, read again for every question."""

    name = "full"
    rival = "re-prefilling"

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory(text=tuple(document_ids(self.base.tokenizer, document.text))) for document in documents]
