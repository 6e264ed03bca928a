"""Checkpoints of a training run: written beside the old one and swapped by name, so one of them is always whole."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hyperlora import ranks
from hyperlora.errors import InputError

NAME, OLD, PARTIAL = "checkpoint", "checkpoint.old", "checkpoint.partial"
_WEIGHTS, _MOMENTS, _POSITION = "generator.safetensors", "optimizer.safetensors", "position.json"


@dataclass(frozen=True)
class Checkpoint:
    """What resuming a run needs besides its optimizer: a module's weights and the position in the run."""

    weights: dict[str, Tensor]
    position: dict[str, Any]

    def restore(self, module: nn.Module) -> None:
        """Put the weights back. Raises InputError when `module` is of another make."""
        try:
            module.load_state_dict(self.weights)
        except RuntimeError as error:
            raise InputError(
                "the checkpoint does not fit the generator that this version of hyperlora makes; choose another -o"
            ) from error

    def write(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, folder / _WEIGHTS)
        (folder / _POSITION).write_text(json.dumps(self.position))


def save_moments(optimizer: Optimizer, folder: Path) -> None:
    state = optimizer.state_dict()["state"]
    save_file({f"{i}.{name}": value for i, found in state.items() for name, value in found.items()}, folder / _MOMENTS)


def load_moments(optimizer: Optimizer, folder: Path) -> None:
    """Raises InputError when they are missing, because another engine wrote the checkpoint, or damaged."""
    if not (folder / _MOMENTS).exists():
        raise InputError(f"{folder} was written with DeepSpeed; go on with the same --deepspeed settings")
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, value in load_file(folder / _MOMENTS).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def replace(run: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder next to the run's checkpoint, then swap the names: a killed process leaves one whole.

    Every process of the run takes part; the first one makes the folder and swaps.

    Raises:
        InputError: the disk cannot be written; the old checkpoint is still there.
    """
    partial, final, old, first = run / PARTIAL, run / NAME, run / OLD, ranks.own() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    ranks.wait()
    try:
        if first:
            partial.mkdir(parents=True)
        ranks.wait()
        write(partial)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"cannot write {final}: {getattr(error, 'strerror', None) or error}") from error
    ranks.wait()
    if first:
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    ranks.wait()


def find(run: Path) -> Path | None:
    """The whole checkpoint in the folder of a run: the old one where a process was killed between the two renames."""
    return next((run / name for name in (NAME, OLD) if (run / name).exists()), None)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError when it is damaged."""
    try:
        return Checkpoint(load_file(folder / _WEIGHTS), read_position(folder))
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def read_position(folder: Path) -> dict[str, Any]:
    """Where a checkpoint's run stands. Raises InputError when it is damaged."""
    try:
        position = json.loads((folder / _POSITION).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(position, dict):
        raise _damaged(folder, ValueError("its position is no JSON object"))
    return position


def _damaged(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder} is damaged ({error}); remove it to start again")
