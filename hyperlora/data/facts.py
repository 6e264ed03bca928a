"""Invented facts: documents that no model can have seen, with split-disjoint names, values and wordings."""

import random
import zlib
from importlib.resources import files
from itertools import product
from typing import Literal

import yaml

from hyperlora.data.items import Item, Question
from hyperlora.data.open_words import OpenWords

Split = Literal["train", "test"]


_WORDS = yaml.safe_load((files("hyperlora.data") / "facts.yaml").read_text(encoding="utf-8"))
_SYLLABLES = _WORDS["syllables"].split()


def _halves(name: str, table: dict[str, str]) -> dict[Split, list[str]]:
    """Every pair of words, a fixed random half of them for each split."""
    words = product(str(table["first"]).split(), str(table["second"]).split())
    pairs = sorted({table.get("joint", " ").join(pair) for pair in words})
    random.Random(name).shuffle(pairs)
    return {"train": pairs[::2], "test": pairs[1::2]}


def _attributes(tables: dict[str, dict[str, str]]) -> dict[str, dict[Split, list[str]]]:
    found: dict[str, dict[Split, list[str]]] = {}
    for name, table in tables.items():
        halves = _halves(name, table)
        found |= {attribute: halves for attribute in (name, *filter(None, table.get("also", "").split(", ")))}
    return found


# The values of every attribute in each split, at least 200.
ATTRIBUTES = _attributes(_WORDS["train"])
NEW_ATTRIBUTES = _attributes(_WORDS["new"])
# What training facts may not take from text: kinds that are new in tests, and the values of tests.
RESERVED = frozenset(
    {*NEW_ATTRIBUTES}
    | {value.lower() for table in (ATTRIBUTES, NEW_ATTRIBUTES) for halves in table.values() for value in halves["test"]}
)
# Wordings by split; those of the test split are never trained on.
_STATEMENTS: dict[str, list[str]] = _WORDS["statements"]
_QUESTIONS: dict[str, list[str]] = _WORDS["questions"]


def _name(rng: random.Random, split: Split) -> str:
    while True:
        name = "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 3)))).capitalize()
        if (zlib.crc32(name.encode()) % 2 == 0) == (split == "train"):
            return name


def _kinds(rng: random.Random, number: int, words: OpenWords | None) -> list[str]:
    """Different kinds to train on; with `words` about half of them are from there."""
    kinds: list[str] = []
    while len(kinds) < number:
        kind = words.kind(rng) if words and rng.random() < 0.5 else rng.choice(list(ATTRIBUTES))
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def fact_document(
    seed: str, count: int, split: Split, new_attributes: bool = False, words: OpenWords | None = None
) -> Item:
    """A document of `count` invented facts, every one of them asked; the same for the same `seed`.

    Documents of the train split have few kinds or many, down to as many as there must be: where hardly two facts share
    a kind, nothing has to be known of the names. With `words` about half of the kinds and their values are from there.
    """
    rng = random.Random(f"facts/{split}/{seed}/{count}/{new_attributes}")
    attributes = NEW_ATTRIBUTES if new_attributes else ATTRIBUTES
    people, kinds = [_name(rng, split) for _ in range(max(2, count // 2))], list(attributes)
    if split == "train":
        fewest, most = -(-count // len(set(people))), min(count, len(ATTRIBUTES))
        kinds = _kinds(rng, rng.randint(fewest, most), words)
    keys: list[tuple[str, str]] = []
    while len(keys) < count:
        key = (rng.choice(people), rng.choice(kinds))
        if key not in keys:
            keys.append(key)
    sentences, questions = [], []
    for name, attribute in keys:
        taken = words if attribute not in attributes else None
        value = taken.value(rng) if taken else rng.choice(attributes[attribute][split])
        fact = {"name": name, "attribute": attribute, "value": value}
        sentences.append(rng.choice(_STATEMENTS[split]).format(**fact))
        reply = "{name}'s {attribute} is {value}.".format(**fact)
        asked = rng.choice(_QUESTIONS[split]).format(**fact)
        questions.append(Question(asked, reply, (reply, fact["value"])))
    return Item(f"facts-{split}-{count}-{seed}", " ".join(sentences), tuple(questions))
