"""Long texts measured in tokens, and sentences hidden in them."""

import re

import numpy as np

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.facts import fact_document
from hyperlora.data.items import Item
from hyperlora.errors import InputError
from hyperlora.prompt import document_ids

MARGIN = 16
# A full stop that ends no "Mr" or initial, and a capital after it. Missing the end of a sentence does no harm.
_SENTENCE = re.compile(r"""(?<!\b[A-Z])(?<!\b[A-Z][a-z])(?<!\bMrs)[.!?]["'”’)]*\s+(?=["'“‘(]*[A-Z])""")


class Book:
    """A text with the places of its tokens and sentences.

    Attributes:
        ends: (tokens + 1,) the characters that the first n tokens cover.
        sentences: the characters before the start of each sentence but the first.
        starts: the whole tokens before each of them.
    """

    def __init__(self, base: Base, item: Item):
        self.id, self.text, self._lower = item.id, item.text, item.text.lower()
        if not base.tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of {base.name} cannot say where its tokens stand in a book; use another base"
            )
        # `verbose` would warn that the text is longer than the model's context.
        tokens = base.tokenizer(
            item.text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        self.ends = np.array([0, *(end for _, end in tokens["offset_mapping"])])
        self.sentences = np.array([match.end() for match in _SENTENCE.finditer(item.text)], dtype=int)
        self.starts = np.searchsorted(self.ends, self.sentences, side="right") - 1

    def __len__(self) -> int:
        return len(self.ends) - 1

    def piece(self, start: int, end: int) -> str:
        """The text of the tokens from `start` to before `end`."""
        return self.text[self.ends[start] : self.ends[end]]

    def new_facts(self, seed: str, number: int) -> list[Item]:
        """Documents of one invented fact each, of different people; no name and no value stands in the book.

        Raises:
            InputError: hardly any invented fact is new to the book.
        """
        facts: list[Item] = []
        for attempt in range(100 * number):
            fact = fact_document(f"{seed}-{attempt}", 1, "test")
            if _absent(fact, self._lower) and all(
                _absent(fact, f.text.lower()) and _absent(f, fact.text.lower()) for f in facts
            ):
                facts.append(fact)
            if len(facts) == number:
                return facts
        raise InputError(f"the source of {self.id} holds the invented facts already; use another source")


def _absent(fact: Item, lower: str) -> bool:
    reply, value = fact.questions[0].accepted
    return value.lower() not in lower and reply.partition("'s ")[0].lower() not in lower


def hide(base: Base, book: Book, start: int, end: int, hidden: list[tuple[int, str]], length: int) -> str:
    """The tokens from `start` to `end` of a book with sentences put in, made to be `length` tokens in all.

    The sum is not known beforehand, since tokens change where text is put in. So the end of the excerpt gives way, or
    its start where a hidden sentence stands at the end; `MARGIN` tokens of the book around the excerpt are enough.

    Args:
        hidden: which sentence of the book each hidden one stands before, in rising order.
    """
    last = book.starts[hidden[-1][0]]
    tries: list[tuple[int, str]] = []
    for _ in range(8):  # it may step to and fro over the length
        parts, at = [], book.ends[start]
        for index, sentence in hidden:
            parts += [book.text[at : book.sentences[index]], sentence, " "]
            at = book.sentences[index]
        text = "".join([*parts, book.text[at : book.ends[end]]]).strip()
        over = len(document_ids(base.tokenizer, text)) - length
        tries.append((abs(over), text))
        if not over:
            break
        if end - last > abs(over):
            end -= over
        else:
            start += over
    return min(tries)[1]
