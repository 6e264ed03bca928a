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
    with track(["tensorboard"], folder, {}) as hand_on:
        start(recipe, folder, "x").run(hand_on)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(folder), rel=1e-5)
    assert [event.step for event in events.Scalars("facts-2/patch_f1")] == [0, recipe.steps]
    for first, left in ((3, [1, 2, 3]), (0, [0])):  # of a run that went on from the second step, or began again
        with track(["tensorboard"], folder, {}, first) as hand_on:
            hand_on({"step": first, "loss": 0.5})
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("train/loss")] == left


class Service:
    """A stand-in for wandb and trackio with the calls that are made of them: nothing is sent anywhere."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.ended: list[int] = []

    def init(self, **given: Any) -> "Service":
        self.begun.append(given)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((numbers, step))
        if self.error:
            raise self.error

    def finish(self, exit_code: int = 0) -> None:
        print("synced")
        self.ended.append(exit_code)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_runs_go_to_the_tracker_that_is_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    (tmp_path / "mine").mkdir()
    with track([name], tmp_path / "mine", {"steps": 3}) as hand_on:
        hand_on({"step": 2, "loss": 1.5, "labels": 9})
        hand_on({"step": 2, "evaluation": "facts-2", "patch_f1": 0.5})
        assert not service.ended
    assert service.ended == [0] and capsys.readouterr() == ("", "synced\n")
    assert service.logged == [({"train/loss": 1.5, "train/labels": 9.0}, 2), ({"facts-2/patch_f1": 0.5}, 2)]
    begun = service.begun
    assert begun[0]["name"].startswith("mine") and begun[0]["config"] == {"steps": 3}
    with pytest.raises(KeyboardInterrupt), track([name], tmp_path / "mine", {"steps": 3}):  # resumed
        raise KeyboardInterrupt
    assert begun[1] == begun[0] and begun[0]["resume"] == "allow"
    assert service.ended[1:] == [1 if name == "wandb" else 0]  # trackio knows no other end
    with track([name], tmp_path / "mine", {"steps": 3}, 1) as hand_on:  # resumed before the step that it had reached
        for step in (1, 2, 3):
            hand_on({"step": step, "loss": 1.5})
    assert [step for _, step in service.logged[2:]] == ([1, 2, 3] if name == "wandb" else [2, 3])  # wandb drops itself
    (tmp_path / "other" / "mine").mkdir(parents=True)
    with track([name], tmp_path / "other" / "mine", {"steps": 3}):  # another run in a folder of the same name
        assert (begun[3]["name"], begun[3].get("id")) != (begun[0]["name"], begun[0].get("id"))


def test_a_tracker_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with (
        pytest.raises(InputError, match=r"wandb cannot begin \(not logged in\); leave out"),
        track(["wandb"], tmp_path, {}),
    ):
        raise AssertionError("the run must not begin")
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_on_the_way_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(ConnectionError("no route"))
    monkeypatch.setitem(sys.modules, "wandb", service)
    with track(["wandb"], tmp_path, {}) as hand_on:
        with pytest.warns(UserWarning, match="wandb failed .no route.; the run goes on"):
            hand_on({"step": 1, "loss": 1.0})
        hand_on({"step": 2, "loss": 1.0})
    assert [step for _, step in service.logged] == [1]


def test_a_tracker_that_does_not_finish_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(exit_code: int) -> None:
        raise TimeoutError("no answer")

    service = Service()
    service.finish = stuck  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", service)
    with pytest.warns(UserWarning, match="wandb did not finish .no answer."), track(["wandb"], tmp_path, {}) as hand_on:
        hand_on({"step": 1, "loss": 1.0})
    assert service.logged == [({"train/loss": 1.0}, 1)]


def test_unknown_and_missing_trackers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'wandb'"):
        check(["wandbb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        check(["wandb"])
