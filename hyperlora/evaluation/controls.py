"""A generator's answers beside their controls: another document's patch, no patch, the document in the prompt."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from hyperlora.data.items import Item
from hyperlora.evaluation.answers import greedy
from hyperlora.evaluation.metrics import METRICS
from hyperlora.generator import Generator
from hyperlora.inject import inject

T = TypeVar("T")

# Condition -> does the prompt hold the document, and whose patch is on (offset within the batch; None: no patch).
CONDITIONS: dict[str, tuple[bool, int | None]] = {
    "patch": (False, 0),
    "swapped": (False, 1),
    "none": (False, None),
    "full": (True, None),
}


def partnered(items: Sequence[T], size: int) -> list[list[T]]:
    """Batches of `size`, and at the end of one more rather than a single item, which has no other beside it."""
    batches = [list(items[i : i + size]) for i in range(0, len(items), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def answer(
    generator: Generator,
    items: Sequence[Item],
    conditions: Sequence[str] = ("patch", "swapped"),
    max_new_tokens: int = 24,
    documents: int = 32,
    progress: str | None = None,
) -> dict[str, list[str]]:
    """Greedy replies to every question of every item, by condition, in the order of the items' questions.

    The swapped patch of a document is that of the next one in its batch of `documents`. `progress` names a bar.
    """
    base = generator.base
    replies: dict[str, list[str]] = {condition: [] for condition in conditions}
    for batch in tqdm(partnered(items, documents), unit="batch", desc=progress, disable=progress is None):
        asked = [(index, question) for index, item in enumerate(batch) for question in item.questions]
        with torch.no_grad():
            factors = generator.factors([generator.encoder.tokenize(item.text) for item in batch])
        for condition in conditions:
            in_prompt, offset = CONDITIONS[condition]
            prompts = [
                base.prompt.prompt_ids(base.tokenizer, question.text, batch[index].text if in_prompt else None)
                for index, question in asked
            ]
            if offset is None:
                replies[condition] += greedy(base, prompts, max_new_tokens)
                continue
            rows = torch.tensor([(index + offset) % len(batch) for index, _ in asked], device=base.device)
            with inject(base.model, factors, rows):
                replies[condition] += greedy(base, prompts, max_new_tokens)
    return replies


def score_controls(
    generator: Generator, items: Sequence[Item], conditions: Sequence[str] = ("patch", "swapped")
) -> dict[str, float]:
    """Mean scores, `condition_metric` -> 0 to 1."""
    accepted = [question.accepted for item in items for question in item.questions]
    scores = {}
    for condition, replies in answer(generator, items, conditions).items():
        for name, metric in METRICS.items():
            values = [metric(reply, answers) for reply, answers in zip(replies, accepted, strict=True)]
            scores[f"{condition}_{name}"] = sum(values) / len(values)
    return scores
