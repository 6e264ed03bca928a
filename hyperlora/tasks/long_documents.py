"""Facts spread over a long document."""

import random
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.items import Item
from hyperlora.data.sources import load
from hyperlora.errors import InputError
from hyperlora.prompt import document_ids
from hyperlora.tasks.book import MARGIN, Book, hide
from hyperlora.tasks.contract import Positive, Task


class LongDocuments(Task):
    """Excerpts of books of `tokens` tokens, meant for 4k to 32k, in which `facts` invented facts are hidden.

    The document is divided into as many equal parts as there are facts; a fact stands between two sentences near the
    middle of each. Every fact is asked, in its order. The base must be able to read `tokens` tokens.
    """

    name: ClassVar[str] = "long_documents"

    source: str = "books"
    tokens: Annotated[int, Field(ge=128)] = 4096
    facts: Positive = 4

    def load(self, base: Base) -> list[Item]:
        books = [Book(base, item) for item in load(self.source)]
        books = [book for book in books if self._starts(book)]
        if not books:
            raise InputError(
                f"the task {self.name} has no documents: no text of {self.source} is long enough for "
                f"{self.tokens} tokens; use fewer tokens or another source"
            )
        return [self._item(base, books, number) for number in range(self.items)]

    def _starts(self, book: Book) -> list[int]:
        """The tokens at which a sentence starts that has enough text after it."""
        return book.starts[book.starts < len(book) - self.tokens - MARGIN].tolist()

    def _item(self, base: Base, books: list[Book], number: int) -> Item:
        name = f"long-{self.tokens}-{self.facts}-{self.seed}-{number}"
        rng = random.Random(name)
        book = rng.choice(books)
        facts = book.new_facts(name, self.facts)
        haystack = self.tokens - sum(len(document_ids(base.tokenizer, fact.text)) for fact in facts)
        if haystack < self.tokens // 2:
            raise InputError(f"{self.facts} facts fill {self.tokens} tokens; give the task fewer facts or more tokens")
        start = rng.choice(self._starts(book))
        middles = [start + round((part + 0.5) / self.facts * haystack) for part in range(self.facts)]
        places = np.searchsorted(book.starts, middles, side="right") - 1
        hidden = [(place, fact.text) for place, fact in zip(places.tolist(), facts, strict=True)]
        text = hide(base, book, start, start + haystack, hidden, self.tokens)
        return Item(name, text, tuple(fact.questions[0] for fact in facts), tags={"length": self.tokens})
