"""Checkpoints of a training run: written beside the old one and swapped by name, so one of them is always whole."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from hyperlora.errors import InputError

NAME, OLD, PARTIAL = "checkpoint", "checkpoint.old", "checkpoint.partial"
_WEIGHTS, _MOMENTS, _POSITION = "generator.safetensors", "optimizer.safetensors", "position.json"


@dataclass(frozen=True)
class Checkpoint:
    """What resuming a run needs: a module's weights, its optimizer's moments, and the position in the run."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    position: dict[str, Any]

    @staticmethod
    def of(module: nn.Module, optimizer: Optimizer, position: dict[str, Any]) -> "Checkpoint":
        moments = {
            f"{index}.{name}": value
            for index, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        return Checkpoint(module.state_dict(), moments, position)

    def restore(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Put the weights and moments back. Raises InputError when `module` is of another make."""
        try:
            module.load_state_dict(self.weights)
        except RuntimeError as error:
            raise InputError(
                "the checkpoint does not fit the generator that this version of hyperlora makes; choose another -o"
            ) from error
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.moments.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def save(self, run: Path) -> None:
        """Write checkpoint/ next to the old one, then swap the names: a killed process leaves one of them whole.

        Raises:
            InputError: the disk cannot be written; the old checkpoint is still there.
        """
        partial, final, old = run / PARTIAL, run / NAME, run / OLD
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, partial / _WEIGHTS)
            save_file(self.moments, partial / _MOMENTS)
            (partial / _POSITION).write_text(json.dumps(self.position))
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(f"cannot write {final}: {getattr(error, 'strerror', None) or error}") from error
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old, ignore_errors=True)


def find(run: Path) -> Path | None:
    """The whole checkpoint in the folder of a run: the old one where a process was killed between the two renames."""
    return next((run / name for name in (NAME, OLD) if (run / name).exists()), None)


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError when it is damaged."""
    try:
        position = json.loads((folder / _POSITION).read_text())
        return Checkpoint(load_file(folder / _WEIGHTS), load_file(folder / _MOMENTS), position)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} is damaged ({error}); remove it to start again") from error
