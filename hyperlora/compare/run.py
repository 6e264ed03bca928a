"""`hyperlora compare`: do the units that are missing, measure costs, put the results together, write the report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hyperlora.base_model import BaseModel
from hyperlora.compare.cache import Cache, digest
from hyperlora.compare.costs import measure_costs
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.replies import replies
from hyperlora.compare.reply_scores import add_reply_scores
from hyperlora.compare.results import collect
from hyperlora.compare.units import Unit, run_unit, unit_key, units
from hyperlora.data.items import Item
from hyperlora.errors import InputError
from hyperlora.evaluation.replies import REPLIES
from hyperlora.files import write_text
from hyperlora.methods import Method
from hyperlora.report import write_report
from hyperlora.runtime import Runtime

_EXPERIMENT, _RESULTS = "experiment.json", "results.json"


class Comparison:
    """An experiment in a folder: experiment.json, units-*.jsonl (what is finished), then results.json,
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
        self.runtime = Runtime(base)
        self._methods: dict[tuple[str, int], Method] = {}
        self._claim()
        self.cache = Cache(folder, "whole" if shard[1] == 1 else f"{shard[0]}-of-{shard[1]}")

    def _claim(self) -> None:
        """Make the folder this experiment's. Raises InputError when it is another's."""
        path = self.folder / _EXPERIMENT
        record = {"name": self.experiment.name, "base": self.base.name}
        if path.exists():
            found = json.loads(path.read_text())
            if {key: found.get(key) for key in record} != record:
                theirs = f"{found.get('name')!r} on {found.get('base')}"
                raise InputError(f"{self.folder} holds the results of experiment {theirs}; choose another -o")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty and holds no comparison; choose another -o")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record | {"experiment": self.experiment.model_dump(mode="json")}, indent=1) + "\n")

    def method(self, label: str, seed: int) -> Method:
        spec = self.experiment.methods[label]
        key = (label, seed if spec.type.seeded else 0)
        if key not in self._methods:
            self._methods[key] = spec.type(self.base, spec.type.Settings(**spec.settings), seed)
        return self._methods[key]

    def _matched(self, label: str) -> Method | None:
        match = self.experiment.methods[label].match
        return self.method(match, self.experiment.seeds_of(match)[0]) if match else None

    def keyed(self) -> Iterator[tuple[Unit, str]]:
        """All units of the experiment with their keys."""
        for unit in units(self.experiment, self.items):
            method, matched = self.method(unit.method, unit.seed), self._matched(unit.method)
            yield unit, unit_key(unit, self.experiment, method, matched, self.base)

    def run(self) -> None:
        """Do this shard's units; those in the cache are not done again."""
        index, count = self.shard
        todo = [pair for number, pair in enumerate(self.keyed()) if number % count == index - 1]
        done = [pair for pair in todo if pair[1] in self.cache]
        with tqdm(total=sum(len(unit.items) for unit, _ in todo), unit="document", desc=self.experiment.name) as bar:
            bar.update(sum(len(unit.items) for unit, _ in done))
            for unit, key in todo:
                if key in self.cache:
                    continue
                bar.set_postfix_str(f"{unit.task}, {unit.method}")
                method, matched = self.method(unit.method, unit.seed), self._matched(unit.method)
                task = self.tasks[unit.task]
                self.cache.add(key, run_unit(unit, task, self.experiment, method, matched, self.runtime, self.cache))
                bar.update(len(unit.items))

    def report(self, command: str) -> list[Path]:
        """Write results.json and the report from finished units.

        Raises:
            InputError: units are missing, because a shard has not run.
        """
        pairs = list(self.keyed())
        missing = sum(key not in self.cache for _, key in pairs)
        if missing:
            raise InputError(f"{missing} of {len(pairs)} units are not done; run again without --shard")
        records = add_reply_scores(self.experiment, self.base, pairs, self.cache)
        finished = [(unit, records[key]) for unit, key in pairs]
        costs = {label: self._costs(label) for label in self.experiment.methods}
        rows = replies(self.items, finished)
        results = collect(self.experiment, self.tasks, self.items, finished, rows, costs, self.base, command)
        write_text(self.folder / REPLIES, "".join(json.dumps(row) + "\n" for row in rows))
        write_text(self.folder / _RESULTS, json.dumps(results, indent=1) + "\n")
        return [self.folder / _RESULTS, self.folder / REPLIES, *write_report(results, self.folder)]

    def _costs(self, label: str) -> dict[str, Any]:
        setting, task = self.experiment.costs, next(iter(self.items))
        items = self.items[task][: setting.documents]
        method, matched = self.method(label, self.experiment.seeds_of(label)[0]), self._matched(label)
        spec = self.experiment.methods[label]
        key = digest("costs", spec.model_dump(), method.identity(), setting.model_dump(), [item.text for item in items])
        if key not in self.cache:
            self.cache.add(key, measure_costs(method, matched, items, setting.tokens, self.runtime))
        return self.cache[key]
