import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hyperlora.errors import InputError
from hyperlora.recipe import Recipe
from hyperlora.trackers import check, track
from hyperlora.training import start

from .conftest import losses


def test_tensorboard_shows_the_losses_of_the_run(recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe.base, folder = tiny_dirs[0], tmp_path / "run"
    start(recipe, folder, "x").run(track(["tensorboard"], folder, {}))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(folder), rel=1e-5)
    assert [event.step for event in events.Scalars("facts-2/patch_f1")] == [0, recipe.steps]
    for first, left in ((3, [1, 2, 3]), (0, [0])):  # of a run that went on from the second step, or began again
        track(["tensorboard"], folder, {}, first)({"step": first, "loss": 0.5})
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == left


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_go_to_the_tracker_that_is_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the two calls that both packages have: nothing is sent anywhere."""
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []
    run = SimpleNamespace(log=lambda numbers, step: logged.append((numbers, step)))
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=lambda **given: begun.append(given) or run))
    (tmp_path / "mine").mkdir()
    hand_on = track([name], tmp_path / "mine", {"steps": 3})
    hand_on({"step": 2, "loss": 1.5, "labels": 9})
    hand_on({"step": 2, "evaluation": "facts-2", "patch_f1": 0.5})
    assert logged == [({"train/loss": 1.5, "train/labels": 9.0}, 2), ({"facts-2/patch_f1": 0.5}, 2)]
    assert begun[0]["name"].startswith("mine") and begun[0]["config"] == {"steps": 3}
    track([name], tmp_path / "mine", {"steps": 3})  # resumed
    assert begun[1] == begun[0] and begun[0]["resume"] == "allow"
    (tmp_path / "other" / "mine").mkdir(parents=True)
    track([name], tmp_path / "other" / "mine", {"steps": 3})  # another run in a folder of the same name
    assert (begun[2]["name"], begun[2].get("id")) != (begun[0]["name"], begun[0].get("id"))


def test_a_tracker_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(InputError, match=r"wandb cannot begin \(not logged in\); leave out"):
        track(["wandb"], tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_on_the_way_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def log(numbers: dict[str, float], step: int) -> None:
        calls.append(step)
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: SimpleNamespace(log=log)))
    hand_on = track(["wandb"], tmp_path, {})
    with pytest.warns(UserWarning, match="wandb failed .no route.; the run goes on"):
        hand_on({"step": 1, "loss": 1.0})
    hand_on({"step": 2, "loss": 1.0})
    assert calls == [1]


def test_unknown_and_missing_trackers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'wandb'"):
        check(["wandbb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        check(["wandb"])
