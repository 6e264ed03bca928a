"""Text that follows a document."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.items import Item
from hyperlora.data.sources import load
from hyperlora.tasks.book import Book
from hyperlora.tasks.contract import Positive, Task


class LanguageModelling(Task):
    """Pieces of `tokens` tokens of a text source, and the `following` tokens after them; no two pieces overlap."""

    name: ClassVar[str] = "language_modelling"
    kind: ClassVar[Literal["answers", "text"]] = "text"
    metrics: ClassVar[tuple[str, ...]] = ("nll",)

    source: str
    tokens: Positive = 512
    following: Positive = 128

    def load(self, base: Base) -> list[Item]:
        needed = f"{self.source} has no text of {self.tokens} + {self.following} tokens; use fewer or another source"
        return self.chosen(self._pieces(base), needed)

    def _pieces(self, base: Base) -> Iterator[Item]:
        span = self.tokens + self.following
        for item in load(self.source):
            book = Book(base, item)
            for start in range(0, len(book) - span + 1, span):
                middle = start + self.tokens
                following = book.piece(middle, start + span)
                yield Item(f"{book.id}@{start}", book.piece(start, middle), following=following)
