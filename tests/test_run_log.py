"""Scores are made once, and by the run that goes on where they were interrupted."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hyperlora.evaluation.controls import score_controls
from hyperlora.recipe import Recipe

from .test_training import trainer


def test_the_first_scores_are_written_once(recipe: Recipe, tmp_path: Path) -> None:
    """Also by a run that was killed after them, and before its first step was saved."""
    run = trainer(recipe, tmp_path / "run")
    run.save()
    run._evaluate([], None)
    again = trainer(recipe, tmp_path / "run")
    assert again.resume() and again.step == 0
    again.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("evaluation" in line and line["step"] == 0 for line in lines) == len(run.evaluation) > 0


def test_a_step_is_saved_before_it_is_scored(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that were interrupted are made by the run that goes on, and those that were made are not made again."""
    recipe.evaluation.facts, recipe.save_every = [1, 2], 100
    whole = trainer(recipe, tmp_path / "whole")
    whole.run()
    calls: list[int] = []

    def die(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == len(whole.evaluation) + 2:
            raise KeyboardInterrupt
        return score_controls(*arguments)

    monkeypatch.setattr("hyperlora.training.score_controls", die)
    for _ in range(2):
        run = trainer(recipe, tmp_path / "run")
        run.resume()
        with suppress(KeyboardInterrupt):
            run.run()
    assert calls and records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_stop_during_scores_is_heard_between_sets(recipe: Recipe, tmp_path: Path) -> None:
    run = trainer(recipe, tmp_path / "run")
    run.step = recipe.steps
    run._evaluate([0.0], None)
    assert run._unscored() == list(run.evaluation) != []


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
