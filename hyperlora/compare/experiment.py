"""Experiments: which methods meet which tasks, as a YAML file says it, checked before anything is loaded."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hyperlora.base_model import DEFAULT_BASE
from hyperlora.errors import InputError, nearest
from hyperlora.methods import METHODS, Method
from hyperlora.methods.adapted import AdaptedFull, shipped_adapter
from hyperlora.methods.truncation import Truncation
from hyperlora.settings import explain, read_yaml
from hyperlora.tasks import Task, read_task

REPLY_METRICS = ("bert_score", "rouge_l")
_ADAPTED = "adapted full"  # label of the control, where the experiment has none of its own


class MethodSpec(BaseModel):
    """One row of the comparison.

    Attributes:
        method: name in the registry; `settings` are its own.
        match: label of the method whose resident bytes this one may take, for budgeted methods.
        items: it is run on the first so many documents of every task only; None for all.
        seeds: instead of the experiment's, for a slow method that is random.
        unit: instead of the experiment's, so that a slow method loses less when it is stopped.
    """

    model_config = ConfigDict(extra="forbid")

    method: str
    settings: dict[str, Any] = {}
    match: str | None = None
    items: int | None = Field(None, gt=1)
    seeds: Annotated[list[int], Field(min_length=1)] | None = None
    unit: int | None = Field(None, gt=1)

    @property
    def type(self) -> type[Method]:
        return METHODS[self.method]


_ROW = ("match", "items", "seeds", "unit")  # what a row may say besides the method and its settings


class CostSetting(BaseModel):
    """Costs are measured on the first `documents` of the first task, one at a time, with `tokens` generated."""

    model_config = ConfigDict(extra="forbid")

    documents: int = Field(3, ge=0)
    tokens: int = Field(16, gt=1)


class Experiment(BaseModel):
    """A whole comparison.

    Attributes:
        unit: documents that are compiled and answered together, and cached together.
        unrelated: a text source on which forgetting is measured; None for no such measurement.
        forgetting_documents: of every task, for forgetting (patches only).
        adapted: label of the method that reads the document with an adapted model, for the adapted gain.
        metrics: further scores of replies: `bert_score`, `rouge_l`.
        readers: other bases that say how likely they find the replies with the document in their prompt, by label; None
            for the experiment's own base.
        curves: methods with growing budgets whose scores are drawn over their compile seconds, by the curve's label.
        training: metrics.jsonl of training runs whose curves are drawn, by label.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    base: str | None = None
    seeds: list[int] = Field([0], min_length=1)
    unit: int = Field(8, gt=1)
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    methods: dict[str, MethodSpec] = Field(min_length=1)
    unrelated: str | None = "wikitext2_test"
    forgetting_documents: int = Field(50, ge=0)
    adapted: str | None = None
    metrics: list[str] = []
    readers: dict[str, str | None] = {}
    curves: dict[str, Annotated[list[str], Field(min_length=2)]] = {}
    training: dict[str, str] = {}
    costs: CostSetting = Field(default_factory=lambda: CostSetting(documents=3, tokens=16))

    def seeds_of(self, label: str) -> list[int]:
        """The seeds that a method is run with: one where seeds change nothing."""
        spec = self.methods[label]
        seeds = spec.seeds or self.seeds
        return seeds if spec.type.seeded else seeds[:1]

    def read_tasks(self) -> dict[str, Task]:
        return {label: read_task(spec, f"task {label}") for label, spec in self.tasks.items()}


def read_experiment(path: Path, base: str | None = None) -> Experiment:
    """Read and check an experiment. In a method, keys other than those of `MethodSpec` are its settings.

    No method is judged without controls. Where they are missing, these are added: `full` and `none`; the truncated
    document at the bytes of every method that makes it smaller (of the first row of each size); and, for the default
    base, the adapted full context.

    Args:
        base: replaces the experiment's.

    Raises:
        InputError: not YAML, an unknown method, task or setting (with the nearest known names), or scores of replies
            where no task has any, in one line.
    """
    content = read_yaml(path, "experiment")
    if not isinstance(content, dict) or not isinstance(content.get("methods"), dict):
        raise InputError(f"{path} is not an experiment: it needs name, tasks and methods")
    specs = {"full": {"method": "full"}, "none": {"method": "none"}} | content["methods"]
    for label, name in {"full": "full", "none": "none", _ADAPTED: AdaptedFull.name}.items():
        if isinstance(spec := specs.get(label), dict) and spec.get("method") != name:
            raise InputError(f"{path}: method {label}: the name is the control's; give this row another label")
    content["methods"] = {label: _method(path, label, spec) for label, spec in specs.items()}
    content["base"] = base or content.get("base")
    _add_controls(content)
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, Experiment.model_fields)}") from error
    for label, method in experiment.methods.items():
        _check_match(path, experiment, label, method)
    named = {"adapted": [experiment.adapted] if experiment.adapted else []}
    named |= {f"curves: {label}": rows for label, rows in experiment.curves.items()}
    for where, labels in named.items():
        for label in labels:
            if label not in experiment.methods:
                hint = nearest(label, experiment.methods)
                raise InputError(f"{path}: {where}: no method {label!r}; {hint}")
    if experiment.adapted and experiment.methods[experiment.adapted].type is not AdaptedFull:
        raise InputError(
            f"{path}: adapted: {experiment.adapted} does not read with an adapted model; name one that does"
        )
    for metric in experiment.metrics:
        if metric not in REPLY_METRICS:
            raise InputError(f"{path}: unknown metric {metric!r}; {nearest(metric, REPLY_METRICS)}")
    tasks = experiment.read_tasks()
    if all(task.kind == "text" for task in tasks.values()):
        for key in ("metrics", "readers"):
            if getattr(experiment, key):
                raise InputError(f"{path}: {key}: no task has replies to score; remove the key or add a task that asks")
    return experiment


def _add_controls(content: dict[str, Any]) -> None:
    methods: dict[str, dict[str, Any]] = content["methods"]
    truncated = [spec.get("match") for spec in methods.values() if spec["method"] == Truncation.name]
    matched = [_size(methods[label]) for label in truncated if isinstance(label, str) and label in methods]
    for label, spec in list(methods.items()):
        if METHODS[spec["method"]].compresses and _size(spec) not in matched:
            matched.append(_size(spec))
            methods[f"{label}'s bytes of text"] = {
                "method": Truncation.name,
                "match": label,
                "items": spec.get("items"),
            }
    readers = [label for label, spec in methods.items() if spec["method"] == AdaptedFull.name]
    if not readers and content["base"] in (None, DEFAULT_BASE) and shipped_adapter().is_dir():
        readers = [_ADAPTED]
        methods[readers[0]] = {"method": AdaptedFull.name}
    if readers:
        content.setdefault("adapted", readers[0])


def _size(spec: dict[str, Any]) -> tuple[str, list[Any]]:
    """What rows whose memories are of one size have in common."""
    return spec["method"], [spec["settings"][name] for name in METHODS[spec["method"]].sized_by]


def _method(path: Path, label: str, spec: Any) -> dict[str, Any]:
    if not isinstance(spec, dict) or "method" not in spec:
        raise InputError(f"{path}: method {label}: expected keys and values, among them 'method'")
    name = spec["method"]
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"{path}: method {label}: unknown method {name!r}; {nearest(str(name), METHODS)}")
    own = {key: value for key, value in spec.items() if key not in ("method", *_ROW)}
    known = METHODS[name].Settings.model_fields
    try:
        settings = METHODS[name].Settings.model_validate(own)
    except ValidationError as error:
        raise InputError(f"{path}: method {label}: {explain(error, [*known, *_ROW])}") from error
    shared = {key: spec[key] for key in _ROW if key in spec}
    return {"method": name, "settings": json.loads(settings.model_dump_json()), **shared}


def _check_match(path: Path, experiment: Experiment, label: str, spec: MethodSpec) -> None:
    if not spec.type.budgeted:
        if spec.match is not None:
            raise InputError(f"{path}: method {label}: {spec.method} takes no budget; remove 'match'")
        return
    if spec.match is None:
        raise InputError(f"{path}: method {label}: {spec.method} needs 'match', the method whose bytes it may take")
    if spec.match not in experiment.methods:
        hint = nearest(spec.match, experiment.methods)
        raise InputError(f"{path}: method {label}: match: no method {spec.match!r}; {hint}")
    if experiment.methods[spec.match].type.budgeted:
        raise InputError(f"{path}: method {label}: match: {spec.match} has a budget itself; name one that has none")
