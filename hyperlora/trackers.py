"""Training metrics for TensorBoard, Weights & Biases or trackio, beside metrics.jsonl; each package is optional."""

import importlib
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hyperlora.errors import InputError, nearest
from hyperlora.files import write_text

Record = dict[str, Any]
Log = Callable[[dict[str, float], int], None]  # numbers by name, and the step


def _tensorboard(folder: Path, settings: Record) -> Log:
    from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(folder: Path, settings: Record) -> Log:
    import wandb

    # A run that goes on is the same run there, which W&B knows by its id and not by its name.
    path = folder / "wandb-id"
    known = path.read_text() if path.exists() else uuid.uuid4().hex
    run = wandb.init(project="hyperlora", name=folder.name, dir=str(folder), config=settings, id=known, resume="allow")
    write_text(path, known)
    return lambda numbers, step: run.log(numbers, step=step)


def _trackio(folder: Path, settings: Record) -> Log:
    import trackio

    run = trackio.init(project="hyperlora", name=folder.name, config=settings, resume="allow")
    return lambda numbers, step: run.log(numbers, step=step)


WRITTEN = {"tensorboard", "wandb", "wandb-id"}  # what they may leave in a run's folder
TRACKERS: dict[str, Callable[[Path, Record], Log]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}


def check(names: Sequence[str]) -> None:
    """Raises InputError for an unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"unknown tracker {name!r}; {nearest(name, TRACKERS)}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"the tracker {name} is not installed; run: pip install {name}") from error


def track(names: Sequence[str], folder: Path, settings: Record) -> Callable[[Record], None]:
    """What hands every record of a run to trackers; scores of an evaluation set are named after it.

    Args:
        settings: of the run, shown beside its curves.
    """
    logs = [TRACKERS[name](folder, settings) for name in names]

    def hand_on(record: Record) -> None:
        group = f"{record['evaluation']}/" if "evaluation" in record else "train/"
        numbers = {group + k: float(v) for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        for log in logs:
            log(numbers, record["step"])

    return hand_on
