"""Kinds and values of facts from the words of real text, so that hardly two documents share any."""

import random
import re
from collections.abc import Sequence
from itertools import combinations

from hyperlora.data.items import Item
from hyperlora.errors import InputError

_WORD = re.compile(r"[A-Za-z]+")
_SHORTEST = 5  # letters of the words that a kind or value consists of; shorter ones mostly bind others together


class OpenWords:
    """Words of `items`, without words and phrases that are `reserved` (in lower case).

    Raises:
        InputError: no word of them can be used.
    """

    def __init__(self, items: Sequence[Item], reserved: frozenset[str]):
        self.reserved = reserved
        self.texts = [words for words in (item.text.split() for item in items) if any(map(self._usable, words))]
        if not self.texts:
            raise InputError("the texts that facts are to take words from hold none; give other sources")

    def kind(self, rng: random.Random) -> str:
        """One word or two, in lower case."""
        return self._span(rng, rng.choice((1, 1, 2))).lower()

    def value(self, rng: random.Random) -> str:
        """One to three words as they stand in the text."""
        return self._span(rng, rng.choice((1, 2, 2, 3)))

    def _span(self, rng: random.Random, count: int) -> str:
        """Up to `count` words in a row: where a text has no more of them beside each other, fewer."""
        while True:
            words = rng.choice(self.texts)
            start = rng.randrange(len(words))
            span = []
            for word in words[start : start + count]:
                if not self._usable(word):
                    break
                span.append(word)
            parts = {" ".join(span[i:j]).lower() for i, j in combinations(range(len(span) + 1), 2)}
            if span and self.reserved.isdisjoint(parts):
                return " ".join(span)

    def _usable(self, word: str) -> bool:
        return len(word) >= _SHORTEST and _WORD.fullmatch(word) is not None and word.lower() not in self.reserved
