"""Refuse to train on what will be tested, by shared word 13-grams.

Source: the overlap analysis of Brown et al. 2020 (arXiv 2005.14165, appendix C) looks for one shared 13-gram; here a
document counts as repeated from 30 % of its 13-grams on, since quotations and set phrases are shared legitimately.
"""

import re

from hyperlora.data.items import Item
from hyperlora.errors import InputError

GRAM = 13


class Overlap(InputError):
    """Training documents repeat evaluation documents."""


def _grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))}  # a short text is one gram


def overlapping(train: list[Item], test: list[Item], share: float = 0.3) -> list[tuple[str, str]]:
    """Pairs (test id, training id) where at least `share` of the test document's word 13-grams stand in training."""
    owner: dict[tuple[str, ...], str] = {}
    wanted = [(item.id, _grams(item.text)) for item in test]
    every: set[tuple[str, ...]] = set().union(*(grams for _, grams in wanted))
    for item in train:
        for gram in _grams(item.text) & every:
            owner.setdefault(gram, item.id)
    found = []
    for name, grams in wanted:
        hits = [owner[gram] for gram in grams if gram in owner]
        if grams and len(hits) >= share * len(grams):
            found.append((name, hits[0]))
    return found


def check_disjoint(train: list[Item], test: list[Item]) -> None:
    """Raises Overlap when training documents repeat an evaluation document."""
    if pairs := overlapping(train, test):
        name, other = pairs[0]
        raise Overlap(
            f"{len(pairs)} evaluation document(s) also stand in the training data, first {name} (in {other}); "
            "take the source out of `mix` or of `evaluation`"
        )
