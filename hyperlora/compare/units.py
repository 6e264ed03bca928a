"""The work of a comparison in units: one method on a few documents of a task, answered under every control."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hyperlora.base_model import BaseModel
from hyperlora.compare.cache import Cache, digest
from hyperlora.compare.experiment import Experiment, MethodSpec
from hyperlora.compare.teacher import teacher_replies
from hyperlora.data.items import Item
from hyperlora.data.mix import window
from hyperlora.data.sources import load_texts
from hyperlora.groups import partnered
from hyperlora.memory import Memory
from hyperlora.methods import Document, Method
from hyperlora.methods.contract import stable_seed
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime
from hyperlora.tasks import Task

_FORMAT = 4  # raised when the meaning of a cached record changes
UNRELATED_TOKENS = 256
Record = dict[str, Any]
CONDITIONS = ("own", "swapped", "beside")


@dataclass(frozen=True)
class Unit:
    """Documents `items` of a task for one method and seed, run together; each is cached for itself.

    The memory of the next document, in a ring, is the swapped control. `forgetting`: how many measure forgetting.
    """

    task: str
    method: str
    seed: int
    items: tuple[Item, ...]
    forgetting: int

    def next(self, index: int) -> int:
        return (index + 1) % len(self.items)


def units(experiment: Experiment, items: dict[str, list[Item]]) -> Iterator[Unit]:
    """All units, in the order in which they are done; what is in a unit does not depend on what was done before."""
    for task, documents in items.items():
        for label, spec in experiment.methods.items():
            size = spec.unit or experiment.unit
            for seed in experiment.seeds_of(label):
                groups = partnered(documents[: spec.items], size)
                for number, group in enumerate(groups):
                    rest = experiment.forgetting_documents - number * size
                    yield Unit(task, label, seed, tuple(group), max(0, min(rest, len(group))))


def item_keys(
    unit: Unit,
    task: Task,
    experiment: Experiment,
    method: Method,
    matched: Method | None,
    base: BaseModel,
    unrelated: str | None,
) -> list[str]:
    """For every document the hash of everything that determines its record; `unrelated` stands for that text."""
    spec = experiment.methods[unit.method]
    shared = digest(
        _FORMAT,
        base.identity,
        str(base.model.dtype),
        identity(spec, method),
        [*identity(experiment.methods[spec.match], matched), matched.seed] if spec.match and matched else None,
        [task.kind, task.max_new_tokens],
        unit.seed if spec.type.seeded else None,
        unrelated,
    )
    contents = [
        [item.id, item.text, item.following, [vars(question) for question in item.questions]] for item in unit.items
    ]
    return [
        digest(shared, content, contents[unit.next(index)], index < unit.forgetting)
        for index, content in enumerate(contents)
    ]


def identity(spec: MethodSpec, method: Method) -> list[Any]:
    """What determines the memories that a method makes, besides base and seed."""
    return [spec.method, method.revision, spec.settings, method.identity()]


def run_unit(
    unit: Unit,
    chosen: Sequence[int],
    task: Task,
    experiment: Experiment,
    method: Method,
    budgets: Callable[[Sequence[Item]], list[int] | None],
    runtime: Runtime,
    cache: Cache,
) -> list[Record]:
    """A record for each of the `chosen` documents (numbers in the unit): bytes, and under every condition the replies
    or the log-likelihoods.

    `budgets`: resident bytes that the memories of documents may take, None for methods without a budget.

    Conditions: `own` memory; `swapped`, that of the next document in the unit; `beside` (patches only), the document in
    the prompt while the patch of another one is on. `unrelated`: nats per token on text that has nothing to do with the
    document.
    """
    base = runtime.base
    needed = sorted({number for index in chosen for number in (index, unit.next(index))})
    items = [unit.items[number] for number in needed]
    compiled = method.compile([Document(item.id, item.text) for item in items], budgets(items))
    memories = dict(zip(needed, compiled, strict=True))
    records: dict[int, Record] = {}
    for index in chosen:
        item, memory = unit.items[index], memories[index]
        records[index] = {
            "document": item.id,
            "tokens": len(document_ids(base.tokenizer, item.text)),
            "resident_bytes": memory.resident_bytes(base),
            "stored_bytes": memory.stored_bytes(base),
            "shared_bytes": 2 * memory.shared.elements if memory.shared else 0,
            "tags": dict(item.tags),
        }
    teacher: dict[int, list[list[int]]] = {}
    if task.kind == "answers":
        taught = teacher_replies([unit.items[index] for index in chosen], task.max_new_tokens, runtime, cache)
        teacher = dict(zip(chosen, taught, strict=True))
    conditions = {
        "own": [(index, index) for index in chosen],
        "swapped": [(unit.next(index), index) for index in chosen],
    }
    _ask(records, conditions, unit.items, memories, task, teacher, runtime)
    forgetting = [index for index in chosen if index < unit.forgetting]
    if forgetting and all(memory.patch is not None for memory in compiled):
        beside = {
            index: memories[unit.next(index)].with_text(document_ids(base.tokenizer, unit.items[index].text))
            for index in forgetting
        }
        pairs = [(index, index) for index in forgetting]
        _ask(records, {"beside": pairs}, unit.items, beside, task, teacher, runtime)
        if experiment.unrelated is not None:
            held = {index: memories[index] for index in forgetting}
            _unrelated(records, unit.items, experiment.unrelated, held, runtime)
    return [records[index] for index in chosen]


def _ask(
    records: Mapping[int, Record],
    conditions: Mapping[str, Sequence[tuple[int, int]]],
    items: Sequence[Item],
    memories: Mapping[int, Memory],
    task: Task,
    teacher: Mapping[int, list[list[int]]],
    runtime: Runtime,
) -> None:
    """Under every condition, given as numbers of a memory and an item, ask the memory what is asked of the item.

    A memory is read once for all that is asked of it, and as many are held as the runtime may run together.
    """
    numbers = list(memories)
    for group in runtime.groups([memories[number] for number in numbers]):
        place = {numbers[index]: row for row, index in enumerate(group)}
        held = runtime.prefill([memories[number] for number in place])
        for condition, pairs in conditions.items():
            asked = [(place[owner], index) for owner, index in pairs if owner in place]
            if task.kind == "text":
                found = _follow(asked, items, held, runtime)
            else:
                found = _answer(asked, items, held, task, teacher, runtime)
            for (_, index), record in zip(asked, found, strict=True):
                records[index][condition] = record


def _follow(
    asked: Sequence[tuple[int, int]], items: Sequence[Item], held: Sequence[Memory], runtime: Runtime
) -> list[Record]:
    """Log-likelihoods of the texts that follow the documents. `asked`: memory and item."""
    prompts = [runtime.continuation(memory, items[index].following) for memory, index in asked]
    return [{"nll": [-float(scores.mean())]} for scores in runtime.log_likelihood(held, prompts)]


def _answer(
    asked: Sequence[tuple[int, int]],
    items: Sequence[Item],
    held: Sequence[Memory],
    task: Task,
    teacher: Mapping[int, list[list[int]]],
    runtime: Runtime,
) -> list[Record]:
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
    records: Mapping[int, Record],
    items: Sequence[Item],
    source: str,
    memories: Mapping[int, Memory],
    runtime: Runtime,
) -> None:
    """Loss on a window of unrelated text, chosen by the document's id, bare and with the document's patch on."""
    texts = load_texts(source)
    tokenizer = runtime.base.tokenizer
    prompts: list[Prompt] = []
    for row, index in enumerate(memories):
        rng = random.Random(stable_seed(items[index].id))
        text = window(tokenizer, rng.choice(texts).text, rng, UNRELATED_TOKENS, 0)[0]
        prompts.append(runtime.continuation(row, text))
    bare = [Memory()] * len(memories)
    for name, held in (("bare", bare), ("patched", list(memories.values()))):
        for index, scores in zip(memories, runtime.log_likelihood(held, prompts), strict=True):
            records[index].setdefault("unrelated", {})[name] = -float(scores.mean())
