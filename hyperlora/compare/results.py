"""From the records of finished units to one results dictionary: scores, differences, gains, flags, costs."""

import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import exp
from typing import Any

import torch

from hyperlora import __version__
from hyperlora.base_model import BaseModel
from hyperlora.compare.costs import break_even, timed_while_counted
from hyperlora.compare.curves import curves
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.replies import examples
from hyperlora.compare.units import CONDITIONS, UNRELATED_TOKENS, Record, Unit
from hyperlora.data.items import Item
from hyperlora.evaluation.bootstrap import interval
from hyperlora.evaluation.gain import recovered_gain
from hyperlora.evaluation.metrics import TEXT_METRICS, lower_is_better
from hyperlora.methods import Method
from hyperlora.methods.truncation import Truncation
from hyperlora.tasks import Task

# Values per document, averaged over questions and seeds: [task][method][condition][metric][document id].
Values = dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]


def collect(
    experiment: Experiment,
    tasks: dict[str, Task],
    items: dict[str, list[Item]],
    finished: Sequence[tuple[Unit, list[Record]]],
    replies: Sequence[Record],
    costs: dict[str, dict[str, Any]],
    base: BaseModel,
    command: str,
) -> dict[str, Any]:
    """Everything that the report shows; what depends on the machine's speed stands under `timing` only."""
    values = _values(tasks, items, finished)
    records = [(unit, record) for unit, group in finished for record in group]
    scores, differences, gains, flags = [], [], [], []
    for task, methods in values.items():
        for method, conditions in methods.items():
            for condition in ("own", "swapped"):
                for metric, found in conditions.get(condition, {}).items():
                    row = {"task": task, "method": method, "condition": condition, "metric": metric}
                    scores.append({**row, **_interval(list(found.values()))})
            differences += _differences(task, method, methods, _rivals(method, experiment))
            gains += _gains(task, method, methods, experiment.adapted)
            flags += _flags(task, method, methods)
    if experiment.adapted is None:
        reason = "the control is missing: no adapted full context; train/adapted_full.py trains one"
        flags.append({"task": "all tasks", "method": "all methods", "metric": "adapted gain", "reason": reason})
    return {
        "name": experiment.name,
        "version": __version__,
        "command": command,
        "base": {"name": base.name, "fingerprint": vars(base.fingerprint), "dtype": str(base.model.dtype)},
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "device": base.device.type},
        "seeds": experiment.seeds,
        "tasks": {
            label: {
                "kind": task.kind,
                "metrics": [*task.metrics, *(["nll", "teacher_nll"] if task.kind == "answers" else [])],
                "documents": len(items[label]),
                "questions": sum(max(1, len(item.questions)) for item in items[label]),
                "settings": experiment.tasks[label],
            }
            for label, task in tasks.items()
        },
        "costs": _measured(experiment, items),
        "methods": {label: _method(label, experiment, records, costs, base) for label in experiment.methods},
        "scores": scores,
        "differences": differences,
        "gains": gains,
        "flags": flags,
        "unrelated": _unrelated(experiment, records, base),
        "forgetting": _forgetting(values, records),
        "by_tag": _by_tag(values, items),
        "curves": curves(experiment, values),
        "examples": examples(replies),
    }


def _values(
    tasks: dict[str, Task], items: dict[str, list[Item]], finished: Sequence[tuple[Unit, list[Record]]]
) -> Values:
    documents = {task: {item.id: item for item in found} for task, found in items.items()}
    sums: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))))
    for unit, records in finished:
        metrics = [name for name in tasks[unit.task].metrics if name in TEXT_METRICS]
        for record in records:
            item = documents[unit.task][record["document"]]
            for condition in [name for name in CONDITIONS if name in record]:
                held = sums[unit.task][unit.method][condition]
                replies = record[condition].get("replies", [])
                for metric in metrics:
                    for reply, question in zip(replies, item.questions, strict=True):
                        held[metric][item.id].append(TEXT_METRICS[metric](reply, question.accepted))
                for metric, found in record[condition].items():
                    if metric != "replies":
                        held[metric][item.id] += found
    return {
        task: {
            method: {
                condition: {
                    metric: {document: statistics.fmean(found) for document, found in by_document.items()}
                    for metric, by_document in metrics.items()
                }
                for condition, metrics in conditions.items()
            }
            for method, conditions in methods.items()
        }
        for task, methods in sums.items()
    }


def _interval(found: Sequence[float]) -> dict[str, Any]:
    mean, low, high = interval(found)
    return {"mean": mean, "low": low, "high": high, "documents": len(found)}


def _paired(one: dict[str, float], other: dict[str, float]) -> list[tuple[float, float]]:
    """Values of the documents that both have."""
    return [(value, other[document]) for document, value in one.items() if document in other]


def _rivals(method: str, experiment: Experiment) -> list[str]:
    """What a method is set against: nothing, the whole document, also for an adapted reader, its bytes of text, and on
    their own documents the methods that ran on fewer (the first row of each)."""
    text = [label for label, spec in experiment.methods.items() if spec.match == method and spec.type is Truncation]
    adapted = [experiment.adapted] if experiment.adapted else []
    few: dict[type[Method], str] = {}
    for label, spec in experiment.methods.items():
        if spec.items is not None and not spec.type.budgeted:
            few.setdefault(spec.type, label)
    return [name for name in ("none", "full", *adapted, *text, *few.values()) if name != method]


def _differences(task: str, method: str, methods: dict[str, Any], rivals: Sequence[str]) -> list[Record]:
    """The method's own score minus those of its rivals, and of its swapped control."""
    rows = []
    for metric, own in methods[method]["own"].items():
        against = {name: methods[name]["own"].get(metric, {}) for name in rivals if name in methods}
        against["swapped"] = methods[method]["swapped"].get(metric, {})
        for name, found in against.items():
            pairs = _paired(own, found)
            if pairs:
                row = {"task": task, "method": method, "against": name, "metric": metric}
                rows.append({**row, **_interval([a - b for a, b in pairs])})
    return rows


def _gains(task: str, method: str, methods: dict[str, Any], adapted: str | None) -> list[Record]:
    rows: list[Record] = []
    if method in ("none", "full"):
        return rows
    for metric, own in methods[method]["own"].items():
        ends = [methods[name]["own"].get(metric, {}) for name in ("none", "full")]
        shared = [document for document in own if all(document in end for end in ends)]
        none, full = ends
        row = {"task": task, "method": method, "metric": metric}
        if shared:
            top = [own[d] - none[d] for d in shared]
            rows.append({**row, "kind": "raw", **recovered_gain(top, [full[d] - none[d] for d in shared])})
        if adapted is None or adapted == method or adapted not in methods:
            continue
        swapped = methods[method]["swapped"][metric]
        reader, misled = methods[adapted]["own"][metric], methods[adapted]["swapped"][metric]
        shared = [d for d in own if d in reader]
        if shared:
            top = [own[d] - swapped[d] for d in shared]
            rows.append({**row, "kind": "adapted", **recovered_gain(top, [reader[d] - misled[d] for d in shared])})
    return rows


def _flags(task: str, method: str, methods: dict[str, Any]) -> list[Record]:
    """Methods whose memory of another document does as well as that of the right one."""
    if method == "none":
        return []
    rows = []
    for metric, own in methods[method]["own"].items():
        pairs = _paired(own, methods[method]["swapped"].get(metric, {}))
        sign = -1 if lower_is_better(metric) else 1
        _, low, _ = interval([sign * (a - b) for a, b in pairs])
        if low <= 0:
            reason = "the memory of another document is not clearly worse than that of the right one"
            rows.append({"task": task, "method": method, "metric": metric, "reason": reason})
    return rows


def _measured(experiment: Experiment, items: dict[str, list[Item]]) -> dict[str, Any]:
    """What costs were measured on."""
    setting, (task, found) = experiment.costs, next(iter(items.items()))
    return {"task": task, "documents": min(setting.documents, len(found)), "tokens": setting.tokens}


def _method(
    label: str,
    experiment: Experiment,
    records: Sequence[tuple[Unit, Record]],
    costs: dict[str, dict[str, Any]],
    base: BaseModel,
) -> dict[str, Any]:
    spec, own = experiment.methods[label], [record for unit, record in records if unit.method == label]
    ratios = [r["tokens"] * base.kv_bytes_per_token / r["resident_bytes"] for r in own if r["resident_bytes"]]
    cost = costs[label]
    rivals: dict[str, dict[str, Any]] = {}
    for name, row in experiment.methods.items():
        if row.type.rival is not None:
            rivals.setdefault(row.type.rival, costs[name])
    even: dict[str, Any] = dict.fromkeys(rivals)
    if cost["compile_flops"] is not None:
        for rival, its in rivals.items():
            flops = cost["compile_flops"], cost["query_flops"], its["compile_flops"], its["query_flops"]
            even[rival] = break_even(*flops)
    return {
        "name": spec.method,
        "settings": spec.settings | ({"match": spec.match} if spec.match else {}),
        "summary": spec.type.summary(),
        "documents": spec.items,
        "seeds": experiment.seeds_of(label) if spec.type.seeded else [],
        "stored_bytes": statistics.median(r["stored_bytes"] for r in own),
        "resident_bytes": statistics.median(r["resident_bytes"] for r in own),
        "shared_bytes": max(r["shared_bytes"] for r in own),
        "effective_ratio": statistics.median(ratios) if ratios else None,
        "compile_flops": cost["compile_flops"],
        "query_flops": cost["query_flops"],
        "timing": cost["timing"] | {"while_counted": timed_while_counted(cost["timing"])},
        "break_even": even,
    }


def _unrelated(
    experiment: Experiment, records: Sequence[tuple[Unit, Record]], base: BaseModel
) -> dict[str, Any] | None:
    """The text on which forgetting was measured, one window for each document; None where it was not."""
    windows = {record["document"] for _, record in records if "unrelated" in record}
    about = {"source": experiment.unrelated, "tokens": UNRELATED_TOKENS, "windows": len(windows)}
    return about | {"behind": base.prompt.prefix} if windows else None


def _forgetting(values: Values, records: Sequence[tuple[Unit, Record]]) -> list[Record]:
    """Loss on unrelated text with the patch on, above the bare model's; and how much worse the model reads a document
    in the prompt while the patch of another one is on."""
    rows: list[Record] = []
    # By method, state and window (chosen by the document's id): the losses of all seeds.
    losses: Any = defaultdict(lambda: {"bare": defaultdict(list), "patched": defaultdict(list)})
    for unit, record in records:
        for state, loss in record.get("unrelated", {}).items():
            losses[unit.method][state][record["document"]].append(loss)
    for method, states in losses.items():
        means = {state: [statistics.fmean(found) for found in windows.values()] for state, windows in states.items()}
        rise = [patched - bare for patched, bare in zip(means["patched"], means["bare"], strict=True)]
        for state, texts in means.items():
            about = {"method": method, "measure": f"perplexity on unrelated text, {state}", "unit": "perplexity"}
            rows.append({**about, **{key: exp(x) if key != "documents" else x for key, x in _interval(texts).items()}})
        measure = "loss on unrelated text, patch on minus bare"
        rows.append({"method": method, "measure": measure, "unit": "nats per token", **_interval(rise)})
    for task, methods in values.items():
        for method, conditions in methods.items():
            for metric, found in conditions.get("beside", {}).items():
                pairs = _paired(found, methods["full"]["own"].get(metric, {}))
                measure = f"{task}: {metric} with the document in the prompt, another's patch on minus bare"
                change = _interval([a - b for a, b in pairs])
                rows.append({"method": method, "measure": measure, "unit": metric, **change})
    return rows


def _by_tag(values: Values, items: dict[str, list[Item]]) -> list[Record]:
    rows = []
    for task, methods in values.items():
        tags = {item.id: _with_pairs(item.tags) for item in items[task] if item.tags}
        names = sorted({name for found in tags.values() for name in found})
        for method, conditions in methods.items():
            for metric, found in conditions["own"].items():
                for name in names:
                    groups: dict[Any, list[float]] = defaultdict(list)
                    for document, value in found.items():
                        if name in tags.get(document, {}):
                            groups[tags[document][name]].append(value)
                    row = {"task": task, "method": method, "metric": metric, "tag": name}
                    rows += [{**row, "value": value, **_interval(group)} for value, group in _ordered(groups)]
    return rows


def _ordered(groups: dict[Any, list[float]]) -> list[tuple[Any, list[float]]]:
    """By value, numbers before words."""
    return sorted(groups.items(), key=lambda pair: (isinstance(pair[0], str), pair[0]))


def _with_pairs(tags: Mapping[str, float | str]) -> dict[str, float | str]:
    """The tags, and every two of them as one, for heat maps: `depth×length` -> `0.5×1024`."""
    pairs = combinations(sorted(tags), 2)
    return {**tags, **{f"{one}×{other}": f"{tags[one]}×{tags[other]}" for one, other in pairs}}
