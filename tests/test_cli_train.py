"""`hyperlora train` and `evaluate` with a tiny model: results, options, bad input."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hyperlora import training
from hyperlora.recipe import Recipe

from .conftest import TEXT, Run, one_line


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str]) -> Path:
    recipe.base, recipe.steps = tiny_dirs[0], 2
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


def test_train_prints_one_json_record(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    code, out, err = run("train", recipe_file, "-o", tmp_path / "run", "--json")
    assert code == 0, err
    summary = json.loads(out)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in metrics if "loss" in record][-1]
    assert summary["steps"] == 2 == last["step"] and summary["loss"] == last["loss"]
    assert summary["evaluation"]["facts-2"]["step"] == 2 and "patch_exact_match" in summary["evaluation"]["facts-2"]
    (tmp_path / "document.txt").write_text(TEXT)
    code, _, err = run("generate", tmp_path / "document.txt", "-o", tmp_path / "p", "--generator", summary["generator"])
    assert code == 0, err
    code, out, err = run("train", recipe_file, "-o", tmp_path / "run", "--json")  # nothing is left to do
    assert code == 0 and json.loads(out) == summary, err
    code, out, _ = run("train", recipe_file, "-o", tmp_path / "run", "--steps", "3")
    assert code == 0 and out == f"{tmp_path / 'run' / 'generator'}\n"


def test_ctrl_c_is_one_line(run: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "start", interrupted)
    code, _, err = run("train", recipe_file, "-o", tmp_path / "run")
    assert code == 130 and one_line(err) == "hyperlora: error: interrupted; what was finished is kept"


def test_train_passes_device_and_dtype_to_the_base(
    run: Run, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, bases = training.load_base, []

    def spy(name: str | None, **options: Any) -> Any:
        bases.append(original(name, **options))
        return bases[-1]

    monkeypatch.setattr(training, "load_base", spy)
    code, _, err = run("train", recipe_file, "-o", tmp_path / "run", "--device", "cpu", "--dtype", "bfloat16")
    assert code == 0 and bases[0].model.dtype == torch.bfloat16 and bases[0].device.type == "cpu", err
    code, _, err = run("train", recipe_file, "-o", tmp_path / "x", "--dtype", "float23")
    assert code == 3 and "did you mean 'float32'" in one_line(err)
    code, _, err = run("train", recipe_file, "-o", tmp_path / "x", "--dtype", "float16")
    assert code == 3 and "use bfloat16 or float32" in one_line(err) and not (tmp_path / "x").exists()
    code, _, err = run("train", recipe_file, "-o", tmp_path / "x", "--device", "gpu")
    assert code == 3 and "unknown device 'gpu'" in one_line(err) and not (tmp_path / "x").exists()


def test_train_goes_on_from_a_generator(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    assert run("train", recipe_file, "-o", tmp_path / "one")[0] == 0
    plain = yaml.safe_load(recipe_file.read_text())
    del plain["generator"]
    recipe_file.write_text(yaml.safe_dump(plain))
    first = tmp_path / "one" / "generator"
    for _ in range(2):  # the second time it is resumed, at its end
        code, _, err = run("train", recipe_file, "-o", tmp_path / "two", "--start-from", first, "--seed", 5)
        assert code == 0, err
    before, after = (load_file(tmp_path / n / "generator" / "model.safetensors") for n in ("one", "two"))
    name = "hypernet.mix.weight"
    assert 0 < (after[name] - before[name]).abs().mean() < 0.2 * before[name].abs().mean()  # not drawn with seed 5
    code, _, err = run("train", recipe_file, "-o", tmp_path / "three", "--start-from", tmp_path / "nothing")
    assert code == 3 and "no generator at" in one_line(err) and not (tmp_path / "three").exists()


QA = json.dumps({"context": TEXT, "qas": [{"question": "Who?", "answers": ["Maro"]}]}).encode()
BAD_DATA = {
    "jsonl not UTF-8": ("bad.jsonl", QA + b"\n" + QA.replace(b"Maro", b"Mar\xf6") + b"\n", "line 2 is not UTF-8"),
    "jsonl not JSON": ("bad.jsonl", QA + b"\nMaro\n", "line 2: not JSON"),
    "jsonl of a list": ("bad.jsonl", QA + b"\n[1, 2]\n", "line 2: expected a JSON object, not list"),
    "jsonl binary": ("bad.jsonl", QA + b"\n\0\0\n", "line 2 is binary"),
    "text not UTF-8": ("bad.txt", b"one\ntwo\nK\xe4se und Brot\n", "line 3 is not UTF-8"),
    "gzip cut short": ("bad.jsonl.gz", gzip.compress(QA * 9)[:-20], "not a whole gzip file"),
    "gzip in name only": ("bad.txt.gz", b"plain", "Not a gzipped file"),
    "missing": ("bad.txt", None, "no data file"),
    "empty": ("bad.txt", b"", "no "),
}


@pytest.mark.parametrize("place", ["mix", "unrelated", "calibration"])
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_training_data_is_one_line(run: Run, recipe_file: Path, tmp_path: Path, name: str, place: str) -> None:
    file, content, message = BAD_DATA[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    recipe = yaml.safe_load(recipe_file.read_text())
    (recipe["mix"][1] if place == "mix" else recipe[place])["sources"] = [str(tmp_path / file)]
    recipe_file.write_text(yaml.safe_dump(recipe))
    code, _, err = run("train", recipe_file, "-o", tmp_path / "run")
    assert code == 3 and message in one_line(err), err
    assert name == "empty" or str(tmp_path / file) in one_line(err)
    assert not (tmp_path / "run").exists()


def test_evaluate_prints_a_table_or_json(run: Run, tmp_path: Path, tiny_dirs: tuple[str, str]) -> None:
    result = tmp_path / "result.json"
    arguments = ["evaluate", "--generator", tiny_dirs[1], "--facts", "1", "--items", "3"]
    code, out, err = run(*arguments, "--output", result)
    assert code == 0 and out.startswith("1 facts: 3 documents, 3 questions\n"), err
    assert [line.split(" | ")[0] for line in out.splitlines()[3:]] == [
        f"| {name}" for name in ("none", "full", "patch", "swapped", "patch - swapped")
    ]
    code, out, err = run(*arguments, "--json")
    assert code == 0 and json.loads(out) == json.loads(result.read_text()), err
    assert json.loads(out)["generator"]["name"] == "tiny"


def test_evaluate_on_files(run: Run, recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str]) -> None:
    arguments = ["evaluate", "--generator", tiny_dirs[1], "--json"]
    code, out, err = run(*arguments, "--qa", tmp_path / "qa.jsonl", "--items", "2", "--conditions", "patch,swapped")
    assert code == 0 and set(json.loads(out)["scores"]) == {"patch", "swapped", "patch - swapped"}, err
    (tmp_path / "wiki.txt").write_text(f" = One = \n{TEXT} = Two = \n{TEXT[::-1]}")
    code, out, err = run(*arguments, "--forgetting", tmp_path / "wiki.txt", "--items", "2")
    assert code == 0 and set(json.loads(out)["scores"]) == {"bare", "patch", "patch - bare"}, err
    code, out, err = run(*arguments, "--second-copy", tmp_path / "qa.jsonl", "--items", "2")
    assert code == 0 and {"none", "full", "patch", "swapped"} <= set(json.loads(out)["scores"]), err
    code, _, err = run(*arguments, "--qa", tmp_path / "none.jsonl")
    assert code == 3 and "no data file" in one_line(err)
    code, out, err = run(*arguments, "--facts", "1", "--items", "2", "--conditions", "patch,patch")
    assert code == 0 and set(json.loads(out)["scores"]) == {"patch"}, err
    code, _, err = run(*arguments, "--needles", "")
    assert code == 3 and "'' is no number of tokens" in one_line(err)
    code, _, err = run(*arguments, "--needles", "200,many")
    assert code == 3 and "'many' is no number of tokens" in one_line(err)
    code, _, err = run(*arguments, "--needles", "200,300", "--items", "25")
    assert code == 3 and "needles: 25 items cannot fill 10 pairs" in one_line(err) and "take 20 or 30" in one_line(err)
    code, _, err = run(*arguments, "--facts", "1", "--output", tmp_path / "no" / "result.json")
    assert code == 3 and "make it first" in one_line(err)
