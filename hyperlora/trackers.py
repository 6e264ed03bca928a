"""Training metrics for TensorBoard, Weights & Biases or trackio, beside metrics.jsonl; each package is optional."""

import importlib
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from hyperlora.errors import InputError, nearest
from hyperlora.files import write_text

Record = dict[str, Any]
Log = Callable[[dict[str, float], int], None]  # numbers by name, and the step


class Tracker(NamedTuple):
    """A run that has begun; `finish` is told whether it ended with an error."""

    log: Log
    finish: Callable[[bool], object]


def _tensorboard(folder: Path, settings: Record, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

    # What an earlier run logged from here on will be repeated.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, lambda failed: writer.close())


def _wandb(folder: Path, settings: Record, step: int) -> Tracker:
    import wandb

    with _known(folder / "wandb-id") as known:
        run = wandb.init(
            project="hyperlora", name=folder.name, dir=str(folder), config=settings, id=known, resume="allow"
        )
    return Tracker(lambda numbers, step: run.log(numbers, step=step), lambda failed: run.finish(exit_code=int(failed)))


def _trackio(folder: Path, settings: Record, step: int) -> Tracker:
    import trackio

    with _known(folder / "trackio-id") as known:  # it knows a run by its name alone
        run = trackio.init(project="hyperlora", name=f"{folder.name}-{known[:8]}", config=settings, resume="allow")
    path = folder / "trackio-step"
    reached = int(path.read_text()) if path.exists() else step

    def log(numbers: dict[str, float], step: int) -> None:
        if step >= reached:  # it would show twice what a run repeats that was killed after its last checkpoint
            run.log(numbers, step=step)
            write_text(path, str(step))

    return Tracker(log, lambda failed: trackio.finish())


@contextmanager
def _known(path: Path) -> Iterator[str]:
    """The id of a run, kept in its folder once it has begun: a run that goes on is the same run there."""
    known = path.read_text() if path.exists() else uuid.uuid4().hex
    yield known
    write_text(path, known)


WRITTEN = {"tensorboard", "trackio-id", "trackio-step", "wandb", "wandb-id"}  # what they may leave in a run's folder
TRACKERS: dict[str, Callable[[Path, Record, int], Tracker]] = {
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


@contextmanager
def track(names: Sequence[str], folder: Path, settings: Record, step: int = 0) -> Iterator[Callable[[Record], None]]:
    """Gives what hands every record of a run to trackers; scores of an evaluation set are named after it. They finish
    the run when the block ends.

    A tracker that fails on the way is left out from there on, with a warning, for the run is worth more.

    Args:
        settings: of the run, shown beside its curves.
        step: the first that will be logged, of a run that goes on.

    Raises:
        InputError: a tracker cannot begin.
    """
    trackers: dict[str, Tracker] = {}

    def hand_on(record: Record) -> None:
        group = f"{record['evaluation']}/" if "evaluation" in record else "train/"
        numbers = {group + k: float(v) for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        for name, tracker in list(trackers.items()):
            try:
                tracker.log(numbers, record["step"])
            except Exception as error:
                del trackers[name]
                warnings.warn(f"the tracker {name} failed ({error}); the run goes on without it", stacklevel=2)

    failed = True
    try:
        for name in names:
            try:
                with redirect_stdout(sys.stderr):  # stdout is for results
                    trackers[name] = TRACKERS[name](folder, settings, step)
            except Exception as error:  # whatever a service may raise
                raise InputError(f"the tracker {name} cannot begin ({error}); leave out --track {name}") from error
        yield hand_on
        failed = False
    finally:
        for name, tracker in trackers.items():
            try:
                with redirect_stdout(sys.stderr):
                    tracker.finish(failed)
            except Exception as error:
                warnings.warn(f"the tracker {name} did not finish ({error}); it may lack the last steps", stacklevel=2)
