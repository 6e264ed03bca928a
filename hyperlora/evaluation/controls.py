"""A generator's answers beside their controls: another document's patch, no patch, the document in the prompt, and
that beside another document's patch."""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from tqdm import tqdm

from hyperlora import ranks
from hyperlora.data.items import Item
from hyperlora.evaluation.answers import greedy
from hyperlora.evaluation.metrics import METRICS
from hyperlora.evaluation.window import check_length, check_window
from hyperlora.generator import Generator
from hyperlora.groups import padded_groups, partnered
from hyperlora.inject import inject

_BATCH_TOKENS = 16384  # padded tokens of prompts and replies at once

# Condition -> does the prompt hold the document, and whose patch is on (offset within the batch; None: no patch).
CONDITIONS: dict[str, tuple[bool, int | None]] = {
    "patch": (False, 0),
    "swapped": (False, 1),
    "none": (False, None),
    "full": (True, None),
    "beside": (True, 1),
}


def answer(
    generator: Generator,
    items: Sequence[Item],
    conditions: Sequence[str] = ("patch", "swapped"),
    max_new_tokens: int = 24,
    documents: int = 32,
    progress: str | None = None,
) -> dict[str, list[str]]:
    """Greedy replies to every question of every item, by condition, in the order of the items' questions.

    The swapped patch of a document is that of the next one in its batch of `documents`. `progress` names a bar, and
    the items in errors.

    Raises:
        InputError: a document is too short to make a patch of, or is to be in the prompt and beyond the model's window.
    """
    base = generator.base
    check_length(progress or "evaluation", items, base)
    if any(CONDITIONS[condition][0] for condition in conditions):
        check_window(progress or "evaluation", items, base, max_new_tokens)
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
            found: dict[int, str] = {}
            for group in padded_groups([len(prompt) + max_new_tokens for prompt in prompts], _BATCH_TOKENS):
                owners = [(asked[number][0] + (offset or 0)) % len(batch) for number in group]
                rows = torch.tensor(owners, device=base.device)
                with nullcontext() if offset is None else inject(base.model, factors, rows):
                    given = greedy(base, [prompts[number] for number in group], max_new_tokens)
                found |= dict(zip(group, given, strict=True))
            replies[condition] += [found[number] for number in range(len(prompts))]
    return replies


def score_controls(
    generator: Generator, items: Sequence[Item], conditions: Sequence[str] = ("patch", "swapped")
) -> dict[str, float]:
    """Mean scores, `condition_metric` -> 0 to 1. Processes that train together share out the questions."""
    own = _own_share(items)
    accepted = [question.accepted for item in own for question in item.questions]
    sums = {}
    for condition, replies in answer(generator, own, conditions).items():
        for name, metric in METRICS.items():
            values = [metric(reply, answers) for reply, answers in zip(replies, accepted, strict=True)]
            sums[f"{condition}_{name}"] = float(sum(values))
    asked = sum(len(item.questions) for item in items)
    return {name: total / asked for name, total in zip(sums, ranks.total(list(sums.values())), strict=True)}


def _own_share(items: Sequence[Item]) -> list[Item]:
    """All documents, since weights that are shared out must be gathered by all at the same time, with this process's
    part of their questions."""
    numbers, mine = itertools.count(), ranks.own()
    return [
        replace(item, questions=tuple(q for q in item.questions if next(numbers) % ranks.count() == mine))
        for item in items
    ]
