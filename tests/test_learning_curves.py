"""eval/learning_curves.py on runs with known curves."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from hyperlora import planning
from hyperlora.hypernet import HYPERNETS
from hyperlora.recipe import read_recipe

SCRIPT = Path(__file__).parents[1] / "eval" / "learning_curves.py"


def write(run: Path, scores: list[float]) -> None:
    """Ten steps of two seconds between evaluations."""
    run.mkdir(parents=True)
    lines = []
    for number, score in enumerate(scores):
        lines += [{"step": 10 * number - 9 + i, "loss": 1.0, "seconds": 2.0} for i in range(10) if number]
        scored = {"patch_exact_match": score, "swapped_exact_match": 0.01}
        lines.append({"step": 10 * number, "evaluation": "facts-1", **scored})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def curves(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), "-o", str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True)


def test_steps_and_seconds_to_thresholds(tmp_path: Path) -> None:
    write(tmp_path / "memory_tokens-0", [0.0, 0.2, 0.6, 0.95])
    write(tmp_path / "memory_tokens-2", [0.0, 0.6, 0.4, 0.5])  # not there to stay at the first crossing
    write(tmp_path / "memory_tokens-1", [0.0, 0.5, 0.7, 0.8])
    write(tmp_path / "perceiver-0", [0.0, 0.0, 0.1, 0.2])
    done = curves(tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert rows == [
        ["memory_tokens", "0", "20", "40", "30", "60", "0.950", "0.010"],
        ["memory_tokens", "1", "10", "20", "not reached", "not reached", "0.800", "0.010"],
        ["memory_tokens", "2", "30", "60", "not reached", "not reached", "0.500", "0.010"],
        ["perceiver", "0", *["not reached"] * 4, "0.200", "0.010"],
    ]
    assert (tmp_path / "out" / "curves.md").read_text() == done.stdout
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "out" / "curves.json").read_text())["memory_tokens"]["0"]) == 4


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    done = curves(tmp_path)
    assert done.returncode == 3 and "no training runs" in done.stderr
    write(tmp_path / "perceiver", [0.0])
    done = curves(tmp_path)
    assert done.returncode == 3 and "not named FAMILY-SEED" in done.stderr and not (tmp_path / "out").exists()


def test_runs_with_several_evaluations_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "perceiver-0", [0.0, 0.5])
    path = tmp_path / "perceiver-0" / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().replace("facts-1", "facts-8"))
    done = curves(tmp_path)
    assert done.returncode == 3 and "evaluates facts-1, facts-8" in done.stderr and not (tmp_path / "out").exists()


def test_the_families_have_as_many_parameters(tmp_path: Path) -> None:
    """On a base of the default one's shape, within 8 % of the associative generator; all else in the recipes is the
    same, but for a family's own learning rate and how long it takes."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 100}
    heads = {"model_type": "llama", "num_attention_heads": 9, "num_key_value_heads": 3}
    (tmp_path / "base.json").write_text(json.dumps(shape | heads))
    recipes = {
        path.stem: read_recipe(path) for path in sorted((SCRIPT.parents[1] / "train" / "one_fact").glob("*.yaml"))
    }
    assert {recipe.generator.hypernet for recipe in recipes.values()} == set(recipes) == set(HYPERNETS)
    own = {"generator": None, "learning_rate": 0.0, "steps": 0}
    assert len({recipe.model_copy(update=own).model_dump_json() for recipe in recipes.values()}) == 1
    sizes = {
        name: planning.plan(recipe, str(tmp_path / "base.json"), 1, [], torch.float32).generator
        for name, recipe in recipes.items()
    }
    assert all(abs(size / sizes["associative"] - 1) < 0.08 for size in sizes.values()), sizes
