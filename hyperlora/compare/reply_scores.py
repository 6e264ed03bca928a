"""Scores of finished replies that need a model of their own: BERTScore, and how likely other models find them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hyperlora.base_model import BaseModel, load_base, locate
from hyperlora.compare.cache import Cache, digest
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.units import CONDITIONS, Record, Unit
from hyperlora.data.items import Item
from hyperlora.evaluation.bert_score import bert_score, installed_encoder, load_encoder
from hyperlora.files import file_sha256
from hyperlora.memory import Memory
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime

# From documents, and each document's replies, to a score for every reply.
Scorer = Callable[[Sequence[Item], Sequence[Sequence[str]]], list[list[float]]]


def check_reply_scores(experiment: Experiment) -> None:
    """Raises InputError when a model that is needed after the last unit is not there."""
    if "bert_score" in experiment.metrics:
        installed_encoder()
    for name in experiment.readers.values():
        if name is not None:
            locate(name)


def add_reply_scores(
    experiment: Experiment, base: BaseModel, keyed: Sequence[tuple[Unit, list[str]]], cache: Cache
) -> list[tuple[Unit, list[Record]]]:
    """The cached records of every unit with the experiment's further scores; what is new is kept in `cache`.

    A reader gives `reply_nll_LABEL`: nats per token of the reply without its end, with the document and the question in
    the prompt.
    """
    found = [(unit, [dict(cache[key]) for key in keys]) for unit, keys in keyed]
    makers: dict[str, tuple[Any, Callable[[], Scorer]]] = {}
    if "bert_score" in experiment.metrics:
        makers["bert_score"] = (None, _bert)
    for label, name in experiment.readers.items():
        makers[f"reply_nll_{label}"] = (_weights(name), lambda name=name: _reader(base, name))  # type: ignore[misc]
    bar = tqdm(total=len(makers) * len(found), unit="unit", desc="scores of replies", disable=not makers)
    for metric, (identity, make) in makers.items():
        scorer: Scorer | None = None  # loaded when something is missing
        for (unit, records), (_, keys) in zip(found, keyed, strict=True):
            bar.update()
            for condition in CONDITIONS:
                held = [n for n, record in enumerate(records) if "replies" in record.get(condition, {})]
                own = {n: digest("reply score", metric, identity, keys[n], condition) for n in held}
                if missing := [n for n in held if own[n] not in cache]:
                    scorer = scorer or make()
                    replies = [records[n][condition]["replies"] for n in missing]
                    scores = scorer([unit.items[n] for n in missing], replies)
                    cache.add({own[n]: score for n, score in zip(missing, scores, strict=True)})
                for n in held:
                    records[n][condition] = records[n][condition] | {metric: cache[own[n]]}
    bar.close()
    return found


def _bert() -> Scorer:
    encoder = load_encoder()

    def score(items: Sequence[Item], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        flat = [reply for group in replies for reply in group]
        scores = iter(bert_score(flat, [list(q.accepted) for item in items for q in item.questions], encoder))
        return [[next(scores).f1 for _ in group] for group in replies]

    return score


def _weights(name: str | None) -> Any:
    """What tells a reader's weights from those of another of the same name: its files, or the hub's id. The
    experiment's own base, None, is in the key of every record."""
    if name is None or not (folder := Path(locate(name))).is_dir():
        return name
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _unended(prompt: Prompt) -> Prompt:
    """Without the token that ends the reply, which one of the greatest length never had. An empty one is its end."""
    return replace(prompt, reply=prompt.reply[:-1] or prompt.reply)


def _reader(base: BaseModel, name: str | None) -> Scorer:
    reader = base if name is None else load_base(name, device=str(base.device), dtype=torch.float32)
    runtime = Runtime(reader)

    def score(items: Sequence[Item], replies: Sequence[Sequence[str]]) -> list[list[float]]:
        memories = [Memory(text=tuple(document_ids(reader.tokenizer, item.text))) for item in items]
        prompts = [
            _unended(runtime.question(index, question.text, reply))
            for index, (item, group) in enumerate(zip(items, replies, strict=True))
            for question, reply in zip(item.questions, group, strict=True)
        ]
        losses = iter([-float(scores.mean()) for scores in runtime.log_likelihood(memories, prompts)])
        return [[next(losses) for _ in group] for group in replies]

    return score
