"""Invented facts: documents that no model can have seen, with split-disjoint names, values and wordings."""

import random
import zlib
from importlib.resources import files
from itertools import product
from typing import Literal

import yaml

from hyperlora.data.items import Item, Question

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
_STATEMENTS = {
    "train": (
        "{name}'s {attribute} is {value}.",
        "The {attribute} of {name} is {value}.",
        "For {name}, the {attribute} is {value}.",
        "{name} says that the {attribute} is {value}.",
        "About {name}: {attribute} is {value}.",
        "{name} has {value} as {attribute}.",
        "{name}, {attribute}: {value}.",
        "{name} ({attribute}: {value}) is on the list.",
        "Our notes list {value} as the {attribute} of {name}.",
        "{value} is {name}'s {attribute}.",
        "{value}, that is the {attribute} of {name}.",
        "When asked for the {attribute}, {name} answered {value}.",
        "{name} wrote down {value} under {attribute}.",
        "As {attribute}, {name} has {value}.",
        "The {attribute} that belongs to {name} was recorded as {value}.",
        "Everybody calls {value} the {attribute} of {name}.",
        "We looked up {name} and found the {attribute} to be {value}.",
        "{name} named {value} as the {attribute}.",
        "Since last year {name}'s {attribute} has been {value}.",
        "According to the letter, the {attribute} of {name} remains {value}.",
        "{name} entered the {attribute} as {value}.",
        "Concerning the {attribute} of {name}, the answer is {value}.",
        "It was {value} that {name} chose as {attribute}.",
    ),
    "test": (
        "It is known that {name}'s {attribute} is {value}.",
        "In the case of {name}, the {attribute} is {value}.",
        "The register gives {name}'s {attribute} as {value}.",
    ),
}
_QUESTIONS = {
    "train": (
        "What is {name}'s {attribute}?",
        "What is the {attribute} of {name}?",
        "Tell me {name}'s {attribute}.",
        "Can you give the {attribute} of {name}?",
        "Which {attribute} does {name} have?",
        "{name}'s {attribute}?",
        "I need the {attribute} of {name}.",
        "Could you say what the {attribute} of {name} is?",
    ),
    "test": (
        "Do you know {name}'s {attribute}?",
        "Please name the {attribute} of {name}.",
        "I would like to know what {name}'s {attribute} is.",
    ),
}


def _name(rng: random.Random, split: Split) -> str:
    while True:
        name = "".join(rng.choices(_SYLLABLES, k=rng.choice((2, 3)))).capitalize()
        if (zlib.crc32(name.encode()) % 2 == 0) == (split == "train"):
            return name


def fact_document(seed: str, count: int, split: Split, new_attributes: bool = False) -> Item:
    """A document of `count` invented facts, every one of them asked; the same for the same `seed`."""
    rng = random.Random(f"facts/{split}/{seed}/{count}/{new_attributes}")
    attributes = NEW_ATTRIBUTES if new_attributes else ATTRIBUTES
    people = [_name(rng, split) for _ in range(max(2, count // 2))]
    keys: list[tuple[str, str]] = []
    while len(keys) < count:
        key = (rng.choice(people), rng.choice(list(attributes)))
        if key not in keys:
            keys.append(key)
    sentences, questions = [], []
    for name, attribute in keys:
        fact = {"name": name, "attribute": attribute, "value": rng.choice(attributes[attribute][split])}
        sentences.append(rng.choice(_STATEMENTS[split]).format(**fact))
        reply = "{name}'s {attribute} is {value}.".format(**fact)
        asked = rng.choice(_QUESTIONS[split]).format(**fact)
        questions.append(Question(asked, reply, (reply, fact["value"])))
    return Item(f"facts-{split}-{count}-{seed}", " ".join(sentences), tuple(questions))
