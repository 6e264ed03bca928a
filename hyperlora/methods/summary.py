"""The document's most central sentences, as many as another method's memory would pay for."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hyperlora.errors import InputError
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method
from hyperlora.methods.truncation import token_budget
from hyperlora.prompt import document_ids


class Summary(Method):
    """Sentences ranked by LexRank (Erkan and Radev 2004: PageRank over TF-IDF cosine similarity), in document order.

    Sentences enter in the order of their rank while they fit the resident bytes of another method; the first that does
    not fit is cut, so that the budget is used up.
    """

    name = "summary"
    budgeted = True

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        assert budgets is not None
        return [
            Memory(text=tuple(self._summary(document.text, token_budget(self.base, budget))))
            for document, budget in zip(documents, budgets, strict=True)
        ]

    def _summary(self, text: str, count: int) -> list[int]:
        pieces = sentences(text)
        ids = [document_ids(self.base.tokenizer, piece) for piece in pieces]
        if sum(map(len, ids)) <= count:
            return document_ids(self.base.tokenizer, text)
        kept: dict[int, list[int]] = {}
        for number in ranking(pieces):
            room = count - sum(map(len, kept.values()))
            if room <= 0:
                break
            kept[number] = ids[number][:room]
        return [token for number in sorted(kept) for token in kept[number]]


def sentences(text: str) -> list[str]:
    """The document cut after every sentence; joined again they are the document."""
    try:
        from sentencex import segment
    except ImportError as error:
        raise InputError('splitting and ranking sentences needs an extra: pip install "hyperlora[eval]"') from error
    found, start = [], 0
    for sentence in segment("en", text):
        begin = text.find(sentence, start)
        if sentence.strip() and begin >= 0:
            found.append(begin)
            start = begin + len(sentence)
    bounds = [0, *found[1:], len(text)]
    return [text[a:b] for a, b in pairwise(bounds) if text[a:b]]


def ranking(pieces: list[str]) -> list[int]:
    """Numbers of the sentences, the most central first; among equals the earlier."""
    try:
        import networkx
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise InputError('splitting and ranking sentences needs an extra: pip install "hyperlora[eval]"') from error
    try:
        weights = TfidfVectorizer(sublinear_tf=True).fit_transform(pieces)
    except ValueError:  # no word of two letters in the whole document
        return list(range(len(pieces)))
    similarity = np.asarray((weights @ weights.T).todense())
    np.fill_diagonal(similarity, 0.0)
    rank = networkx.pagerank(networkx.from_numpy_array(similarity), weight="weight")
    return sorted(range(len(pieces)), key=lambda number: (-round(rank[number], 9), number))
