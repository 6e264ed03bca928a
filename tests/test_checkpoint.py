"""A training run goes on from whatever a killed process left on the disk."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hyperlora import checkpoint
from hyperlora.checkpoint import Checkpoint, load_moments, save_moments
from hyperlora.errors import InputError
from hyperlora.recipe import Recipe
from hyperlora.training import start

from .conftest import losses


def half_written(run: Path, name: str) -> None:
    (run / name).mkdir(exist_ok=True)
    (run / name / "generator.safetensors").write_bytes(b"half")


def old_only(run: Path) -> None:
    (run / "checkpoint").rename(run / "checkpoint.old")


def partial_only(run: Path) -> None:
    shutil.rmtree(run / "checkpoint")
    half_written(run, "checkpoint.partial")


def old_and_whole_partial(run: Path) -> None:
    shutil.copytree(run / "checkpoint", run / "checkpoint.partial")
    old_only(run)


def old_and_half_partial(run: Path) -> None:
    half_written(run, "checkpoint.partial")
    old_only(run)


@pytest.mark.parametrize(
    ("leave", "step"),
    [
        (lambda run: None, 3),
        (old_only, 3),
        (partial_only, 0),
        (old_and_whole_partial, 3),
        (old_and_half_partial, 3),
        (lambda run: half_written(run, "checkpoint.partial"), 3),
        (lambda run: half_written(run, "checkpoint.old"), 3),
    ],
    ids=["checkpoint", "old", "partial", "old+partial", "old+half partial", "checkpoint+partial", "checkpoint+old"],
)
def test_a_killed_run_repeats_the_lost_steps(
    recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str], leave: Callable[[Path], None], step: int
) -> None:
    recipe.base = tiny_dirs[0]
    start(recipe, tmp_path / "whole", "x").run()

    def die(record: dict[str, object]) -> None:
        if record.get("step") == 5 and "loss" in record:
            raise SystemExit

    with pytest.raises(SystemExit):
        start(recipe, tmp_path / "run", "x").run(die)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    leave(tmp_path / "run")
    again = start(recipe, tmp_path / "run", "x")
    assert again.step == step
    again.run()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 6
    whole, run = ((tmp_path / n / "generator" / "model.safetensors").read_bytes() for n in ("whole", "run"))
    assert whole == run
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint", "generator", "metrics.jsonl"}


@pytest.fixture
def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return module, optimizer


def save(run: Path, module: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, int]) -> None:
    def write(folder: Path) -> None:
        Checkpoint(module.state_dict(), position).write(folder)
        save_moments(optimizer, folder)

    checkpoint.replace(run, write)


def test_full_disk_keeps_the_checkpoint(small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path) -> None:
    save(tmp_path, *small, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write"):
            save(tmp_path, *small, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert checkpoint.load(tmp_path / "checkpoint").position == {"step": 1}


@pytest.mark.parametrize("content", ['{"step": ', "[1]"])
def test_a_damaged_position_is_told(
    small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path, content: str
) -> None:
    """To a run with DeepSpeed too, which looks at the position first."""
    save(tmp_path, *small, {"step": 1})
    (tmp_path / "checkpoint" / "position.json").write_text(content)
    for read in (checkpoint.load, checkpoint.read_position):
        with pytest.raises(InputError, match=r"is damaged .* remove it to start again"):
            read(tmp_path / "checkpoint")


def test_checkpoint_of_another_make(small: tuple[nn.Module, torch.optim.Optimizer], tmp_path: Path) -> None:
    module, optimizer = small
    save(tmp_path, module, optimizer, {})
    loaded = checkpoint.load(tmp_path / "checkpoint")
    loaded.restore(module)
    load_moments(optimizer, tmp_path / "checkpoint")
    with pytest.raises(InputError, match="does not fit the generator"):
        loaded.restore(nn.Linear(64, 65))
    (tmp_path / "checkpoint" / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match="written with DeepSpeed"):
        load_moments(optimizer, tmp_path / "checkpoint")
