"""What `hyperlora evaluate` measures: answers under controls, the document's own text, forgetting on unrelated text."""

import random
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item, is_text
from hyperlora.data.mix import window
from hyperlora.data.sources import load, load_texts
from hyperlora.errors import InputError, nearest
from hyperlora.evaluation.bootstrap import interval
from hyperlora.evaluation.controls import CONDITIONS, answer
from hyperlora.evaluation.gain import recovered_gain
from hyperlora.evaluation.metrics import METRICS
from hyperlora.generator import Generator
from hyperlora.groups import partnered
from hyperlora.inject import inject
from hyperlora.objectives import Batch, Row, collate, label_logits
from hyperlora.prompt import encode
from hyperlora.structure import context_window

_BATCH = 16


def evaluate_answers(
    generator: Generator, name: str, items: Sequence[Item], conditions: Sequence[str]
) -> dict[str, Any]:
    """Scores per condition, patch minus swapped patch, and the document in the prompt beside another's patch minus the
    document alone (forgetting), each as [mean, low, high] over documents, also `by` the documents' tags and their
    values. `name` is the set's."""
    for condition in conditions:
        if condition not in CONDITIONS:
            raise InputError(f"unknown condition {condition!r}; {nearest(condition, CONDITIONS)}")
    if len(items) < 2:
        raise InputError(f"{name}: {len(items)} document(s); the swapped control needs at least two")
    replies = answer(generator, items, conditions, progress=name)
    owners = [index for index, item in enumerate(items) for _ in item.questions]
    accepted = [question.accepted for item in items for question in item.questions]
    scores: dict[str, dict[str, Any]] = {}
    per_document: dict[tuple[str, str], list[float]] = {}
    for condition in conditions:
        for metric, function in METRICS.items():
            sums, counts = [0.0] * len(items), [0] * len(items)
            for owner, reply, answers in zip(owners, replies[condition], accepted, strict=True):
                sums[owner] += function(reply, answers)
                counts[owner] += 1
            values = [total / number for total, number in zip(sums, counts, strict=True)]
            per_document[condition, metric] = values
            scores.setdefault(condition, {})[metric] = interval(values)
    for one, other in (("patch", "swapped"), ("beside", "full")):
        if {one, other} <= set(conditions):
            for metric in METRICS:
                pairs = zip(per_document[one, metric], per_document[other, metric], strict=True)
                scores.setdefault(f"{one} - {other}", {})[metric] = interval([a - b for a, b in pairs])
    return {
        "task": name,
        "documents": len(items),
        "questions": len(accepted),
        "generator": _origin(generator),
        "scores": scores,
        "by": _by_tag(items, {condition: per_document[condition, "exact_match"] for condition in conditions}),
    }


def _by_tag(items: Sequence[Item], scores: dict[str, list[float]]) -> dict[str, Any]:
    """Tag -> its value -> condition -> exact match as [mean, low, high]."""
    found: dict[str, Any] = {}
    for tag in dict.fromkeys(tag for item in items for tag in item.tags):
        values = [item.tags.get(tag) for item in items]
        found[tag] = {
            str(value): {
                condition: interval([score for score, own in zip(all_scores, values, strict=True) if own == value])
                for condition, all_scores in scores.items()
            }
            for value in sorted({value for value in values if value is not None})
        }
    return found


def evaluate_forgetting(
    generator: Generator, source: str, count: int, in_prompt: bool = False, tokens: int = 256
) -> dict[str, Any]:
    """Loss (nats per token) on unrelated text, bare and with the patches of other documents on: `count` windows of
    `tokens` tokens of the source, the patch of each made from another window of 160 tokens of another document.

    Args:
        in_prompt: the text stands where a prompt has its document, instead of being a text of its own.
    """
    base, rng, items = generator.base, random.Random("forgetting"), load_texts(source)
    if len(items) < 2:
        raise InputError(f"{source} has {len(items)} document(s); forgetting needs at least two")
    picked = [rng.sample(items, 2) for _ in range(count)]
    losses: dict[str, list[float]] = {"bare": [], "patch": []}
    for start in tqdm(range(0, count, _BATCH), unit="batch", desc="forgetting"):
        group = picked[start : start + _BATCH]
        documents = [window(base.tokenizer, item.text, rng, 160, 0)[0] for item, _ in group]
        texts = [window(base.tokenizer, item.text, rng, tokens, 0)[0] for _, item in group]
        before = encode(base.tokenizer, base.prompt.prefix) if in_prompt else generator.encoder.sink
        ids = [before + generator.encoder.tokenize(text) for text in texts]
        batch = collate([Row(i, row, len(before) + 1) for i, row in enumerate(ids)], base.device)
        with torch.no_grad():
            losses["bare"] += _row_losses(base, batch)
            with inject(base.model, generator.factors([generator.encoder.tokenize(d) for d in documents])):
                losses["patch"] += _row_losses(base, batch)
    rise = [a - b for a, b in zip(losses["patch"], losses["bare"], strict=True)]
    scores = {name: {"loss": interval(values)} for name, values in losses.items()}
    scores["patch - bare"] = {"loss": interval(rise)}
    return {
        "task": f"unrelated text of {source}" + (", in a prompt" if in_prompt else ""),
        "documents": count,
        "questions": count,
        "generator": _origin(generator),
        "scores": scores,
    }


def evaluate_second_copy(
    generator: Generator, source: str, max_tokens: int, count: int | None = None
) -> dict[str, Any]:
    """Loss (nats per token) on documents of at most `max_tokens` tokens, ordered by hash: without them (none), behind a
    first copy of their text (full), with their own patch and with that of another document on. The first token of a
    document is not scored.

    Returns:
        like the others, and `share`, of the drop from none to full that the patch gives, with its interval, see
        `recovered_gain`.

    Raises:
        InputError: fewer than two such documents.
    """
    base, sink = generator.base, generator.encoder.sink
    items = sorted(load(source), key=lambda item: zlib.crc32(item.id.encode()))
    texts = [generator.encoder.tokenize(item.text) for item in items if is_text(item.text)]
    texts = [ids for ids in texts if len(ids) <= max_tokens][:count]
    if len(texts) < 2:
        raise InputError(f"{source} has {len(texts)} document(s) of at most {max_tokens} tokens; two are needed")
    longest, window = len(sink) + 2 * max(map(len, texts)), context_window(base.model)
    if longest > window:
        raise InputError(
            f"two copies of a document are {longest} tokens, the base's window is {window}; lower --max-tokens"
        )
    losses: dict[str, list[float]] = {"none": [], "full": [], "patch": [], "swapped": []}
    for group in tqdm(partnered(texts, _BATCH), unit="batch", desc="second copy"):
        once = collate([Row(i, sink + ids, len(sink) + 1) for i, ids in enumerate(group)], base.device)
        twice = collate([Row(i, sink + 2 * ids, len(sink + ids) + 1) for i, ids in enumerate(group)], base.device)
        with torch.no_grad():
            losses["none"] += _row_losses(base, once)
            losses["full"] += _row_losses(base, twice)
            factors = generator.factors(group)
            for name, offset in (("patch", 0), ("swapped", 1)):
                with inject(base.model, factors, (once.documents + offset) % len(group)):
                    losses[name] += _row_losses(base, once)
    scores = {name: {"loss": interval(values)} for name, values in losses.items()}
    drops = {name: [a - b for a, b in zip(losses["none"], losses[name], strict=True)] for name in ("patch", "full")}
    return {
        "task": f"second copy of {source}, up to {max_tokens} tokens",
        "documents": len(texts),
        "questions": len(texts),
        "generator": _origin(generator),
        "scores": scores,
        "share": recovered_gain(drops["patch"], drops["full"]),
    }


def _row_losses(base: BaseModel, batch: Batch) -> list[float]:
    losses = F.cross_entropy(label_logits(base.model, batch), batch.targets, reduction="none")
    return [float(part.mean()) for part in losses.split(batch.labelled.sum(1).tolist())]


def _origin(generator: Generator) -> dict[str, Any]:
    origin = generator.provenance
    return {
        "name": origin.generator,
        "hash": origin.generator_hash,
        "rank": generator.config.rank,
        "layers": len(generator.sites),
        "base": origin.base,
    }


def table(result: dict[str, Any]) -> str:
    """The scores as a Markdown table: mean [95 % interval]."""
    metrics = list(next(iter(result["scores"].values())))
    lines = [
        f"{result['task']}: {result['documents']} documents, {result['questions']} questions",
        f"| | {' | '.join(metrics)} |",
        f"|---|{'---|' * len(metrics)}",
    ]
    for condition, values in result["scores"].items():
        lines.append(f"| {condition} | {' | '.join(map(_cell, values.values()))} |")
    for tag, found in result.get("by", {}).items():
        names = list(next(iter(found.values())))
        lines += ["", f"| {tag}, exact match | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        lines += [f"| {value} | {' | '.join(map(_cell, scores.values()))} |" for value, scores in found.items()]
    if share := result.get("share"):
        found = (
            "too weak a drop to divide by" if share["weak"] else "{gain:.3f} [{low:.3f}, {high:.3f}]".format(**share)
        )
        lines.append(f"\nshare of the drop from none to full that the patch gives: {found}")
    return "\n".join(lines)


def _cell(value: Sequence[float]) -> str:
    mean, low, high = value
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
