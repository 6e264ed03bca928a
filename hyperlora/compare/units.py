"""The work of a comparison, cut into units: one method on a few documents of a task, answered under every control."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hyperlora.base_model import BaseModel
from hyperlora.compare.cache import Cache, digest
from hyperlora.compare.experiment import Experiment, MethodSpec
from hyperlora.compare.teacher import teacher_replies
from hyperlora.data.items import Item
from hyperlora.data.mix import window
from hyperlora.data.sources import load
from hyperlora.memory import Memory
from hyperlora.methods import Document, Method
from hyperlora.methods.contract import stable_seed
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime
from hyperlora.tasks import Task

_FORMAT = 3  # raised when the meaning of a cached record changes
_UNRELATED_TOKENS = 256
CONDITIONS = ("own", "swapped", "beside")


@dataclass(frozen=True)
class Unit:
    """Documents `items` of a task for one method and seed. `forgetting`: how many of them measure forgetting."""

    task: str
    method: str
    seed: int
    number: int
    items: tuple[Item, ...]
    forgetting: int


def units(experiment: Experiment, items: dict[str, list[Item]]) -> Iterator[Unit]:
    """All units, in the order in which they are done; what is in a unit does not depend on what was done before."""
    for task, documents in items.items():
        for label, spec in experiment.methods.items():
            size = spec.unit or experiment.unit
            for seed in experiment.seeds_of(label):
                groups = _groups(documents[: spec.items], size)
                for number, group in enumerate(groups):
                    rest = experiment.forgetting_documents - number * size
                    yield Unit(task, label, seed, number, tuple(group), max(0, min(rest, len(group))))


def _groups(items: Sequence[Item], size: int) -> list[list[Item]]:
    groups = [list(items[i : i + size]) for i in range(0, len(items), size)]
    if len(groups) > 1 and len(groups[-1]) == 1:  # a document alone has no other memory beside it
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def unit_key(
    unit: Unit, task: Task, experiment: Experiment, method: Method, matched: Method | None, base: BaseModel
) -> str:
    """Hash of everything that determines the unit's record."""
    spec = experiment.methods[unit.method]
    return digest(
        _FORMAT,
        vars(base.fingerprint),
        str(base.model.dtype),
        identity(spec, method),
        [*identity(experiment.methods[spec.match], matched), matched.seed] if spec.match and matched else None,
        [task.kind, task.max_new_tokens],
        unit.seed if spec.type.seeded else None,
        [unit.forgetting, experiment.unrelated],
        [[item.id, item.text, item.following, [vars(question) for question in item.questions]] for item in unit.items],
    )


def identity(spec: MethodSpec, method: Method) -> list[Any]:
    """What determines the memories that a method makes, besides base and seed."""
    return [spec.method, method.revision, spec.settings, method.identity()]


def run_unit(
    unit: Unit,
    task: Task,
    experiment: Experiment,
    method: Method,
    budgets: Sequence[int] | None,
    runtime: Runtime,
    cache: Cache,
) -> list[dict[str, Any]]:
    """One record for each document: bytes, and under every condition the replies or the log-likelihoods.

    `budgets`: resident bytes that the memories may take, for methods with a budget.

    Conditions: `own` memory; `swapped`, that of the next document in the unit; `beside` (patches only), the document in
    the prompt while the patch of another one is on. `unrelated`: nats per token on text that has nothing to do with the
    document.
    """
    base = runtime.base
    documents = [Document(item.id, item.text) for item in unit.items]
    memories = method.compile(documents, budgets)
    count = len(documents)
    records: list[dict[str, Any]] = [
        {
            "document": item.id,
            "tokens": len(document_ids(base.tokenizer, item.text)),
            "resident_bytes": memory.resident_bytes(base),
            "stored_bytes": memory.stored_bytes(base),
            "shared_bytes": 2 * memory.shared.elements if memory.shared else 0,
            "tags": dict(item.tags),
        }
        for item, memory in zip(unit.items, memories, strict=True)
    ]
    own = list(range(count))
    following = [(index + 1) % count for index in own]
    teacher = teacher_replies(unit.items, task.max_new_tokens, runtime, cache) if task.kind == "answers" else []
    conditions = {"own": own, "swapped": following}
    _ask(records, conditions, unit.items, memories, task, teacher, runtime)
    if unit.forgetting and all(memory.patch is not None for memory in memories):
        texts = [document_ids(base.tokenizer, item.text) for item in unit.items]
        beside = [memories[following[index]].with_text(texts[index]) for index in own[: unit.forgetting]]
        _ask(records, {"beside": own[: unit.forgetting]}, unit.items, beside, task, teacher, runtime)
        if experiment.unrelated is not None:
            _unrelated(records, unit, experiment.unrelated, memories, runtime)
    return records


def _ask(
    records: list[dict[str, Any]],
    conditions: dict[str, list[int]],
    items: Sequence[Item],
    memories: Sequence[Memory],
    task: Task,
    teacher: Sequence[Sequence[list[int]]],
    runtime: Runtime,
) -> None:
    """Under every condition answer the questions of item i from memory conditions[...][i].

    A memory is read once for all that is asked of it, and as many are held as the runtime may run together.
    """
    for group in runtime.groups(memories):
        held = runtime.prefill([memories[owner] for owner in group])
        for condition, owners in conditions.items():
            asked = [(group.index(owner), index) for index, owner in enumerate(owners) if owner in group]
            found = (_follow if task.kind == "text" else _answer)(asked, items, held, task, teacher, runtime)
            for (_, index), record in zip(asked, found, strict=True):
                records[index][condition] = record


def _follow(
    asked: Sequence[tuple[int, int]], items: Sequence[Item], held: Sequence[Memory], _: Task, __: Any, runtime: Runtime
) -> list[dict[str, Any]]:
    """Log-likelihoods of the texts that follow the documents. `asked`: memory and item."""
    prompts = [runtime.continuation(memory, items[index].following) for memory, index in asked]
    return [{"nll": [-float(scores.mean())]} for scores in runtime.log_likelihood(held, prompts)]


def _answer(
    asked: Sequence[tuple[int, int]],
    items: Sequence[Item],
    held: Sequence[Memory],
    task: Task,
    teacher: Sequence[Sequence[list[int]]],
    runtime: Runtime,
) -> list[dict[str, Any]]:
    """Replies to the items' questions; losses of the accepted answers and of the teacher's replies."""
    prompts, gold, taught = [], [], []
    for memory, index in asked:
        for question, reply in zip(items[index].questions, teacher[index], strict=True):
            prompts.append(runtime.question(memory, question.text))
            gold.append(runtime.question(memory, question.text, question.reply))
            taught.append(replace(prompts[-1], reply=reply))
    replies = iter(runtime.generate(held, prompts, task.max_new_tokens))
    losses = [-float(scores.mean()) for scores in runtime.log_likelihood(held, gold + taught)]
    nll, teacher_nll = iter(losses[: len(gold)]), iter(losses[len(gold) :])
    return [
        {
            "replies": [next(replies) for _ in items[index].questions],
            "nll": [next(nll) for _ in items[index].questions],
            "teacher_nll": [next(teacher_nll) for _ in items[index].questions],
        }
        for _, index in asked
    ]


def _unrelated(
    records: list[dict[str, Any]], unit: Unit, source: str, memories: Sequence[Memory], runtime: Runtime
) -> None:
    """Loss on a window of unrelated text, chosen by the document's id, bare and with the document's patch on."""
    texts = load(source)
    tokenizer = runtime.base.tokenizer
    prompts: list[Prompt] = []
    for index, item in enumerate(unit.items[: unit.forgetting]):
        rng = random.Random(stable_seed(item.id))
        text = window(tokenizer, rng.choice(texts).text, rng, _UNRELATED_TOKENS, 0)[0]
        prompts.append(runtime.continuation(index, text))
    bare = [Memory()] * len(memories)
    for name, held in (("bare", bare), ("patched", memories)):
        for record, scores in zip(records, runtime.log_likelihood(held, prompts), strict=False):
            record.setdefault("unrelated", {})[name] = -float(scores.mean())
