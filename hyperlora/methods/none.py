"""No document at all: what the base knows or guesses."""

from collections.abc import Sequence

from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method


class Nothing(Method):
    """The question alone."""

    name = "none"

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory() for _ in documents]
