"""A needle in a haystack."""

import random
from itertools import product
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, model_validator

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.items import Item
from hyperlora.data.sources import load
from hyperlora.errors import InputError
from hyperlora.prompt import document_ids
from hyperlora.tasks.book import MARGIN, Book, hide
from hyperlora.tasks.contract import Task


class Needles(Task):
    """An invented fact between two sentences of a book; every pair of a length and a depth gets as many documents.

    The book is cut at tokens, not at words, so that length and depth are what they should be. `items` must be a
    multiple of the number of pairs.

    Attributes:
        lengths: of the whole document, in tokens of the base.
        depths: share of the haystack that stands before the needle.
    """

    name: ClassVar[str] = "needles"

    source: str = "books"
    lengths: list[Annotated[int, Field(ge=128)]] = Field([512, 1024, 2048], min_length=1)
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)

    @model_validator(mode="after")
    def _evenly(self) -> "Needles":
        pairs = len(self.lengths) * len(self.depths)
        below = self.items // pairs * pairs
        if below != self.items:
            near = f"{below} or {below + pairs}" if below else str(pairs)
            raise ValueError(f"{self.items} items cannot fill {pairs} pairs of length and depth evenly; take {near}")
        return self

    def load(self, base: Base) -> list[Item]:
        books = [Book(base, item) for item in load(self.source)]
        cells = list(product(self.lengths, self.depths))
        return [self._item(base, books, number, *cells[number % len(cells)]) for number in range(self.items)]

    def _item(self, base: Base, books: list[Book], number: int, length: int, depth: float) -> Item:
        name = f"needle-{length}-{depth}-{self.seed}-{number}"
        rng = random.Random(name)
        for book in rng.sample(books, len(books)):
            fact = book.new_facts(name, 1)[0]
            haystack = length - len(document_ids(base.tokenizer, fact.text))
            before = round(depth * haystack)
            least, most = before + MARGIN, len(book) - (haystack - before) - MARGIN
            if places := np.flatnonzero((book.starts >= least) & (book.starts <= most)).tolist():
                place = rng.choice(places)
                start = int(book.starts[place]) - before
                text = hide(base, book, start, start + haystack, [(place, fact.text)], length)
                return Item(name, text, fact.questions, tags={"depth": depth, "length": length})
        raise InputError(
            f"the task {self.name} has no documents: no text of {self.source} is long enough for {length} tokens; "
            "use a smaller length or another source"
        )
