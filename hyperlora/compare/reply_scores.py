"""Further scores of finished replies: against the accepted answers, and how likely other models find them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hyperlora.base_model import BaseModel, check_base, load_base, locate
from hyperlora.compare.cache import Cache, digest
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.units import CONDITIONS, Record, Unit
from hyperlora.data.items import Item
from hyperlora.evaluation.bert_score import bert_score, installed_encoder, load_encoder
from hyperlora.evaluation.metrics import rouge_l
from hyperlora.evaluation.window import check_fits
from hyperlora.files import file_sha256
from hyperlora.memory import Memory
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime

_FORMAT = 2  # raised when the meaning of a reader's scores changes
_DOCUMENTS = 8  # scored together, with the replies of all methods to what is asked of them

# From documents, and sets of replies to each one's questions, to a score for every reply.
Sets = Sequence[Sequence[str]]
Scorer = Callable[[Sequence[Item], Sequence[Sets]], list[list[list[float]]]]
Compare = Callable[[Sequence[str], Sequence[Sequence[str]]], Iterable[float]]  # of replies with accepted answers


def check_reply_scores(experiment: Experiment) -> None:
    """Raises InputError or BaseNotFound when a model that is needed after the last unit is not there."""
    if "bert_score" in experiment.metrics:
        installed_encoder()
    for name in experiment.readers.values():
        if name is not None:
            check_base(name)


def add_reply_scores(
    experiment: Experiment, base: BaseModel, keyed: Sequence[tuple[Unit, list[str]]], cache: Cache
) -> list[tuple[Unit, list[Record]]]:
    """The cached records of every unit with the experiment's further scores; what is new is kept in `cache`.

    A reader gives `reply_nll_LABEL`: nats per token of the reply without its end, with the document and the question in
    the prompt.

    Raises:
        InputError: a document with a question and a reply is beyond a reader's window (all three are named).
    """
    found = [(unit, [dict(cache[key]) for key in keys]) for unit, keys in keyed]
    makers: dict[str, tuple[Any, Callable[[], Scorer]]] = {}
    if "bert_score" in experiment.metrics:
        makers["bert_score"] = (_files(Path(installed_encoder())), _bert)
    if "rouge_l" in experiment.metrics:
        makers["rouge_l"] = (None, _rouge)
    for label, name in experiment.readers.items():
        makers[f"reply_nll_{label}"] = ([_FORMAT, _weights(name)], lambda name=name: _reader(base, name))  # type: ignore[misc]
    for metric, (identity, make) in makers.items():
        # By document, whose text is then read once: replies under every method and condition, by their scores' key.
        missing: dict[tuple[str, str], tuple[Item, dict[str, list[str]]]] = {}
        for (unit, records), (_, keys) in zip(found, keyed, strict=True):
            for item, record, key in zip(unit.items, records, keys, strict=True):
                for condition in _answered(record):
                    if (own := _key(metric, identity, key, condition)) not in cache:
                        named = replace(item, id=f"{item.id} of task {unit.task}")  # as errors call it
                        asked = missing.setdefault((unit.task, item.id), (named, {}))
                        asked[1][own] = record[condition]["replies"]
        if missing:
            _score(make(), list(missing.values()), cache, metric)
        for (_, records), (_, keys) in zip(found, keyed, strict=True):
            for record, key in zip(records, keys, strict=True):
                for condition in _answered(record):
                    scores = cache[_key(metric, identity, key, condition)]
                    record[condition] = record[condition] | {metric: scores}
    return found


def _answered(record: Record) -> list[str]:
    return [condition for condition in CONDITIONS if "replies" in record.get(condition, {})]


def _key(metric: str, identity: Any, key: str, condition: str) -> str:
    return digest("reply score", metric, identity, key, condition)


def _score(scorer: Scorer, missing: Sequence[tuple[Item, dict[str, list[str]]]], cache: Cache, metric: str) -> None:
    """Score the replies to what documents are asked, and keep the scores under their keys, some documents at a time."""
    with tqdm(total=len(missing), unit="document", desc=metric) as bar:
        for start in range(0, len(missing), _DOCUMENTS):
            group = missing[start : start + _DOCUMENTS]
            scores = scorer([item for item, _ in group], [list(replies.values()) for _, replies in group])
            pairs = zip(group, scores, strict=True)
            cache.add({key: own for (_, keys), found in pairs for key, own in zip(keys, found, strict=True)})
            bar.update(len(group))


def _bert() -> Scorer:
    encoder = load_encoder()
    return _against_answers(lambda replies, accepted: [found.f1 for found in bert_score(replies, accepted, encoder)])


def _rouge() -> Scorer:
    return _against_answers(lambda replies, accepted: map(rouge_l, replies, accepted))


def _against_answers(compare: Compare) -> Scorer:
    def score(items: Sequence[Item], replies: Sequence[Sets]) -> list[list[list[float]]]:
        pairs = zip(items, replies, strict=True)
        accepted = [list(question.accepted) for item, sets in pairs for _ in sets for question in item.questions]
        flat = [reply for sets in replies for group in sets for reply in group]
        return _like(replies, compare(flat, accepted))

    return score


def _like(replies: Sequence[Sets], flat: Iterable[float]) -> list[list[list[float]]]:
    """One number for each reply, in the order of the replies and with their nesting."""
    left = iter(flat)
    return [[[next(left) for _ in group] for group in sets] for sets in replies]


def _weights(name: str | None) -> Any:
    """What tells a reader's weights from those of another of the same name: its files, or the hub's id. The
    experiment's own base, None, is in the key of every record."""
    if name is None or not (folder := Path(locate(name))).is_dir():
        return name
    return _files(folder)


def _files(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _unended(prompt: Prompt) -> Prompt:
    """Without the token that ends the reply, which one of the greatest length never had. An empty one is its end."""
    return replace(prompt, reply=prompt.reply[:-1] or prompt.reply)


def _reader(base: BaseModel, name: str | None) -> Scorer:
    reader = base if name is None else load_base(name, device=str(base.device), dtype=torch.float32)
    runtime = Runtime(reader)

    def score(items: Sequence[Item], replies: Sequence[Sets]) -> list[list[list[float]]]:
        asked = [
            [
                _unended(runtime.question(0, question.text, reply))
                for group in sets
                for question, reply in zip(item.questions, group, strict=True)
            ]
            for item, sets in zip(items, replies, strict=True)
        ]
        for item, prompts in zip(items, asked, strict=True):
            longest = max(len(prompt.ids) + len(prompt.reply) for prompt in prompts)
            check_fits(f"reader {reader.name}, document {item.id}", item.text, longest, reader)
        memories = [Memory(text=tuple(document_ids(reader.tokenizer, item.text))) for item in items]
        scored: dict[int, list[list[float]]] = {}
        for numbers in runtime.groups(memories):
            held = runtime.prefill([memories[number] for number in numbers])
            prompts = [
                replace(prompt, memory=place) for place, number in enumerate(numbers) for prompt in asked[number]
            ]
            losses = [-float(scores.mean()) for scores in runtime.log_likelihood(held, prompts)]
            scored |= dict(zip(numbers, _like([replies[number] for number in numbers], losses), strict=True))
        return [scored[number] for number in range(len(items))]

    return score
