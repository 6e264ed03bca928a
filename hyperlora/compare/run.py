"""`hyperlora compare`: do the units that are missing, measure costs, put the results together, write the report."""

import json
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hyperlora.base_model import BaseModel
from hyperlora.compare.cache import Cache, digest
from hyperlora.compare.costs import COSTS_FORMAT, measure_costs
from hyperlora.compare.curves import training_curves
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.replies import replies
from hyperlora.compare.reply_scores import add_reply_scores, check_reply_scores
from hyperlora.compare.results import collect
from hyperlora.compare.units import Record, Unit, identity, item_keys, run_unit, units
from hyperlora.data.items import Item
from hyperlora.data.sources import SOURCES, load
from hyperlora.errors import InputError
from hyperlora.evaluation.replies import REPLIES
from hyperlora.evaluation.window import check_window
from hyperlora.files import write_text
from hyperlora.methods import Document, Method
from hyperlora.report import check_plots, write_report
from hyperlora.runtime import Runtime
from hyperlora.tasks import read_task

_EXPERIMENT, _RESULTS = "experiment.json", "results.json"


class Comparison:
    """An experiment in a folder: experiment.json, records-*.jsonl (what is finished), then results.json,
    replies.jsonl (every question as every method answered it) and the report.

    Args:
        shard: (i, n), do only every n-th unit from the i-th on, i from 1.
    """

    def __init__(self, experiment: Experiment, base: BaseModel, folder: Path, shard: tuple[int, int] = (1, 1)):
        self.experiment, self.base, self.folder, self.shard = experiment, base, folder, shard
        self.tasks = experiment.read_tasks()
        self.items: dict[str, list[Item]] = {}
        for label, task in self.tasks.items():
            self.items[label] = task.load(base)
            if len(self.items[label]) < 2:
                found = len(self.items[label])
                raise InputError(f"task {label} has {found} document(s); the swapped control needs at least two")
            check_window(f"task {label}", self.items[label], base, task.max_new_tokens)
        self.unrelated = self._identify_unrelated()
        if shard[0] == 1:  # the one that reports, where they run together
            check_reply_scores(experiment)
            training_curves(experiment)
            check_plots()
        self.runtime = Runtime(base)
        self._methods: dict[tuple[str, int], Method] = {}
        self._common: dict[Hashable, Any] = {}
        self._bytes: dict[tuple[str, str, int], int] = {}  # by method, document and seed
        self._claim()
        self.cache = Cache(folder, "whole" if shard[1] == 1 else f"{shard[0]}-of-{shard[1]}")

    def _identify_unrelated(self) -> str | None:
        """The name of a set, or the hash of another text. Raises InputError when there is no such text."""
        source = self.experiment.unrelated
        if not source or not self.experiment.forgetting_documents:
            return source
        if not (texts := [item.text for item in load(source)]):
            raise InputError(f"unrelated: {source} has no text; name another source")
        return source if source in SOURCES else digest(texts)

    def _claim(self) -> None:
        """Make the folder this experiment's. Raises InputError when it is another's."""
        path = self.folder / _EXPERIMENT
        record: dict[str, Any] = {"name": self.experiment.name, "base": self.base.name}
        prompt = vars(self.base.prompt)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder} is a file; choose another -o")
        names = [entry.name for entry in self.folder.iterdir()] if self.folder.exists() else []
        if _EXPERIMENT in names:
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise InputError(f"{path} cannot be read ({error}); choose another -o") from error
            if not isinstance(found, dict):
                raise InputError(f"{path} is no JSON object; choose another -o")
            theirs = f"{found.get('name')!r} on {found.get('base')}"
            if {key: found.get(key) for key in record} != record:
                raise InputError(f"{self.folder} holds the results of experiment {theirs}; choose another -o")
            self._check_tasks(found, f"{self.folder} holds the results of experiment {theirs}")
            if found.get("prompt", prompt) != prompt:
                raise InputError(
                    f"{self.folder} was asked in another prompt format, such as that of another chat template; choose "
                    "another -o"
                )
        elif any(not name.startswith(f".{_EXPERIMENT}-") for name in names):  # another shard may just be writing it
            raise InputError(f"{self.folder} is not empty and holds no comparison; choose another -o")
        self.folder.mkdir(parents=True, exist_ok=True)
        record |= {"experiment": self.experiment.model_dump(mode="json"), "prompt": prompt}
        write_text(path, json.dumps(record, indent=1) + "\n")

    def _check_tasks(self, found: dict[str, Any], what: str) -> None:
        """Raises InputError unless both have tasks in common, which are the same but for how many items they have."""
        theirs = found.get("experiment", {}).get("tasks", {})
        both = [label for label in self.experiment.tasks if label in theirs]
        if not both:
            raise InputError(f"{what} with other tasks; choose another -o")
        for label in both:
            if _but_for_items(self.experiment.tasks[label], label) != _but_for_items(theirs[label], label):
                raise InputError(f"{what} whose task {label!r} is another one; choose another label or another -o")

    def method(self, label: str, seed: int) -> Method:
        spec = self.experiment.methods[label]
        key = (label, seed if spec.type.seeded else 0)
        if key not in self._methods:
            self._methods[key] = spec.type(self.base, spec.type.Settings(**spec.settings), seed)
            self._methods[key].common = self._common
        return self._methods[key]

    def _matched(self, label: str) -> Method | None:
        match = self.experiment.methods[label].match
        return self.method(match, self.experiment.seeds_of(match)[0]) if match else None

    def keyed(self) -> Iterator[tuple[Unit, list[str]]]:
        """All units of the experiment with the keys of their documents."""
        for unit in units(self.experiment, self.items):
            method, matched = self.method(unit.method, unit.seed), self._matched(unit.method)
            task = self.tasks[unit.task]
            yield unit, item_keys(unit, task, self.experiment, method, matched, self.base, self.unrelated)

    def _budgets(self, label: str, items: Sequence[Item]) -> list[int] | None:
        """Resident bytes of the matched method, known from finished documents or from memories made for this."""
        matched, match = self._matched(label), self.experiment.methods[label].match
        if matched is None or match is None:
            return None
        places = [(match, item.text, matched.seed) for item in items]
        if any(place not in self._bytes for place in places):
            self._learn_bytes()
        unknown = {place: item for place, item in zip(places, items, strict=True) if place not in self._bytes}
        if unknown:
            memories = matched.compile([Document(item.id, item.text) for item in unknown.values()])
            sizes = [memory.resident_bytes(self.base) for memory in memories]
            self._bytes |= dict(zip(unknown, sizes, strict=True))
        return [self._bytes[place] for place in places]

    def _learn_bytes(self) -> None:
        """From all records in the folder, also those of other shards, which may have come since."""
        self.cache.read()
        for unit, keys in self.keyed():
            seed = self.method(unit.method, unit.seed).seed
            for item, key in zip(unit.items, keys, strict=True):
                if key in self.cache:
                    self._bytes[unit.method, item.text, seed] = self.cache[key]["resident_bytes"]

    def run(self) -> None:
        """Do this shard's units; documents in the cache are not done again."""
        index, count = self.shard
        todo = [pair for number, pair in enumerate(self.keyed()) if number % count == index - 1]
        with tqdm(total=sum(len(keys) for _, keys in todo), unit="document", desc=self.experiment.name) as bar:
            for unit, keys in todo:
                missing = [number for number, key in enumerate(keys) if key not in self.cache]
                if missing:
                    bar.set_postfix_str(f"{unit.task}, {unit.method}")
                    records = self._run(unit, missing)
                    self.cache.add({keys[n]: record for n, record in zip(missing, records, strict=True)})
                bar.update(len(keys))

    def _run(self, unit: Unit, numbers: Sequence[int]) -> list[Record]:
        method, task = self.method(unit.method, unit.seed), self.tasks[unit.task]
        budgets = partial(self._budgets, unit.method)
        return run_unit(unit, numbers, task, self.experiment, method, budgets, self.runtime, self.cache)

    def report(self, command: str) -> list[Path]:
        """Write results.json and the report from finished records.

        Raises:
            InputError: documents are missing, because a shard has not run.
        """
        pairs = list(self.keyed())
        count = sum(len(keys) for _, keys in pairs)
        missing = sum(key not in self.cache for _, keys in pairs for key in keys)
        if missing:
            raise InputError(f"{missing} of {count} documents are not done; run again without --shard")
        finished = add_reply_scores(self.experiment, self.base, pairs, self.cache)
        labels = tqdm(self.experiment.methods, unit="method", desc="costs")
        costs = {label: self._costs(label) for label in labels}
        rows = replies(self.items, finished)
        results = collect(self.experiment, self.tasks, self.items, finished, rows, costs, self.base, command)
        write_text(self.folder / REPLIES, "".join(json.dumps(row) + "\n" for row in rows))
        write_text(self.folder / _RESULTS, json.dumps(results, indent=1) + "\n")
        return [self.folder / _RESULTS, self.folder / REPLIES, *write_report(results, self.folder)]

    def _costs(self, label: str) -> dict[str, Any]:
        setting, task = self.experiment.costs, next(iter(self.items))
        seed = self.experiment.seeds_of(label)[0]
        items = self.items[task][: setting.documents]
        method, budgets = self.method(label, seed), self._budgets(label, items)
        about = [self.base.identity, str(self.base.model.dtype), self.base.device.type]
        own = [*identity(self.experiment.methods[label], method), budgets, setting.model_dump()]
        read = [[item.text, [question.text for question in item.questions[:1]]] for item in items]
        # Seed 0 is not named: what was measured with it before seeds were in the key is found.
        seeds = [seed] if method.seeded and seed else []
        key = digest("costs", COSTS_FORMAT, about, own, read, *seeds)
        if key not in self.cache:
            self.cache.add({key: measure_costs(method, budgets, items, setting.tokens, self.runtime)})
        return self.cache[key]


def _but_for_items(spec: dict[str, Any], label: str) -> dict[str, Any]:
    """All settings of a task but how many items it has; as they are written where it cannot be read."""
    try:
        return read_task(spec, label).model_dump(exclude={"items"})
    except InputError:
        return spec
