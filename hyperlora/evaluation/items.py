"""Evaluation sets: new invented facts, and one question on each real document, chosen by hash."""

import zlib

from hyperlora.base_model import BaseModel
from hyperlora.data.facts import fact_document
from hyperlora.data.items import Item
from hyperlora.data.sources import load
from hyperlora.errors import InputError
from hyperlora.prompt import document_ids
from hyperlora.recipe import Evaluation
from hyperlora.tasks import read_task
from hyperlora.tasks.needles import Needles

_DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def fact_items(facts: int, count: int, new_attributes: bool = False) -> list[Item]:
    """`count` new documents of `facts` facts of the test split, every fact asked."""
    return [fact_document(str(number), facts, "test", new_attributes) for number in range(count)]


def qa_items(source: str, base: BaseModel, max_tokens: int, count: int | None = None) -> list[Item]:
    """Documents of at most `max_tokens`, ordered and asked by hash: one question each, the first `count`."""
    items = []
    for item in sorted(load(source), key=lambda item: zlib.crc32(item.id.encode())):
        if item.questions and len(document_ids(base.tokenizer, item.text)) <= max_tokens:
            question = min(item.questions, key=lambda question: zlib.crc32(question.text.encode()))
            items.append(Item(item.id, item.text, (question,)))
    return items[:count]


def needle_items(base: BaseModel, lengths: list[int], count: int | None = None) -> list[Item]:
    """`count` excerpts of books of `lengths` tokens with an invented fact at five depths, as many of every kind; by
    default up to 500.

    Raises:
        InputError: `count` cannot be shared out evenly to lengths and depths, or the books are too short.
    """
    pairs = len(lengths) * len(_DEPTHS)
    items = count or max(1, 500 // pairs) * pairs
    setting = {"task": Needles.name, "lengths": lengths, "depths": _DEPTHS, "items": items}
    return read_task(setting, "needles").load(base)


def evaluation_sets(setting: Evaluation, base: BaseModel) -> dict[str, list[Item]]:
    """The sets that a recipe asks for, by name."""
    sets = {f"facts-{n}": fact_items(n, max(2, setting.items // n), setting.new_attributes) for n in setting.facts}
    sets |= {name: qa_items(name, base, setting.max_tokens, setting.items) for name in setting.qa}
    for name, items in sets.items():
        if len(items) < 2:
            raise InputError(
                f"evaluation set {name} has {len(items)} document(s) of at most {setting.max_tokens} tokens"
            )
    return sets
