"""Curves: rows of one method with growing budgets over their seconds, and training logs over steps."""

import json
from pathlib import Path
from typing import Any

from hyperlora.compare.experiment import Experiment
from hyperlora.errors import InputError
from hyperlora.evaluation.bootstrap import interval

Record = dict[str, Any]


def curves(experiment: Experiment, values: Any) -> list[Record]:
    """Points [at, mean, low, high]; over seconds, `at` is the label of a method, whose compile time is meant."""
    rows: list[Record] = []
    for label, methods in experiment.curves.items():
        for task, found in values.items():
            for metric in found[methods[0]]["own"]:
                by_method = [found[method]["own"][metric] for method in methods]
                shared = [document for document in by_method[0] if all(document in other for other in by_method)]
                points = [
                    [method, *interval([scores[d] for d in shared])]
                    for method, scores in zip(methods, by_method, strict=True)
                ]
                rows.append({"label": label, "task": task, "metric": metric, "x": "seconds", "points": points})
    return rows + training_curves(experiment)


def training_curves(experiment: Experiment) -> list[Record]:
    """Of the experiment's training runs, over steps. Raises InputError when a file is not a run's metrics."""
    return [row for label, path in experiment.training.items() for row in _training(label, Path(path))]


def _training(label: str, path: Path) -> list[Record]:
    """The losses (means of a tenth of the steps) and the evaluations in the metrics.jsonl of a training run."""
    losses: list[tuple[int, float]] = []
    found: dict[tuple[str, str], list[list[Any]]] = {}
    try:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            step = int(record.pop("step"))
            if "loss" in record:
                losses.append((step, float(record["loss"])))
            elif "evaluation" in record:
                task = record.pop("evaluation")
                for metric, value in record.items():
                    found.setdefault((task, metric), []).append([step, float(value), None, None])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"training curve {label}: {path} is not the metrics.jsonl of a training run") from error
    size = max(1, len(losses) // 10)
    blocks = [losses[start : start + size] for start in range(0, len(losses), size)]
    found["training", "nll"] = [[block[-1][0], *interval([loss for _, loss in block])] for block in blocks]
    return [
        {"label": label, "task": task, "metric": metric, "x": "steps", "points": points}
        for (task, metric), points in found.items()
        if points
    ]
