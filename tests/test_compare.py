import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.compare.cache import Cache
from hyperlora.compare.costs import break_even, flops
from hyperlora.compare.experiment import read_experiment
from hyperlora.compare.gain import recovered_gain
from hyperlora.compare.run import Comparison
from hyperlora.errors import InputError
from hyperlora.memory import Memory
from hyperlora.methods import METHODS
from hyperlora.prompt import document_ids
from hyperlora.runtime import Runtime

from .conftest import TEXT, make_generator

pytest.importorskip("matplotlib")

SENTENCES = [line.strip() for line in TEXT.splitlines() if line.strip()]


@pytest.fixture
def experiment(base: BaseModel, tmp_path: Path) -> Path:
    """Five documents with one or two questions, a patch, and what it is compared with."""
    make_generator(base).save_pretrained(tmp_path / "generator")
    rows = [
        {
            "id": f"doc-{number}",
            "context": f"{SENTENCES[number % 4]} Note {number}.",
            "questions": [{"question": f"What is note {number}?", "answers": [f"note {number}"]}] * (1 + number % 2),
        }
        for number in range(5)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "experiment.yaml"
    path.write_text(f"""
name: tiny
seeds: [0, 1]
unit: 2
tasks:
  notes: {{task: jsonl, path: {tmp_path / "data.jsonl"}, max_new_tokens: 4}}
methods:
  patch: {{method: generator, path: {tmp_path / "generator"}}}
  head: {{method: truncation, match: patch}}
  cache: {{method: kv_cache, items: 3}}
  evicted: {{method: random_eviction, match: patch}}
unrelated: null
forgetting_documents: 3
costs: {{documents: 1, tokens: 3}}
""")
    return path


def without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timing(found) for key, found in value.items() if key != "timing"}
    return [without_timing(found) for found in value] if isinstance(value, list) else value


def compared(experiment: Path, base: BaseModel, folder: Path, shard: tuple[int, int] = (1, 1)) -> Comparison:
    comparison = Comparison(read_experiment(experiment), base, folder, shard)
    comparison.run()
    return comparison


def results(folder: Path) -> Any:
    return without_timing(json.loads((folder / "results.json").read_text()))


def test_a_comparison_holds_its_controls(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    files = compared(experiment, base, tmp_path / "out").report("the command")
    assert {path.name for path in files} >= {"results.json", "results.md", "report.html"}
    found = results(tmp_path / "out")
    assert set(found["methods"]) == {"full", "none", "patch", "head", "cache", "evicted"}
    scores = {(s["method"], s["condition"], s["metric"]): s for s in found["scores"]}
    assert scores["patch", "own", "f1"]["documents"] == 5 and scores["cache", "swapped", "nll"]["documents"] == 3
    assert scores["full", "own", "nll"]["mean"] != scores["full", "swapped", "nll"]["mean"]
    assert scores["none", "own", "nll"]["mean"] == scores["none", "swapped", "nll"]["mean"]
    against = {(d["method"], d["against"]) for d in found["differences"]}
    assert {("patch", "none"), ("patch", "full"), ("patch", "swapped"), ("cache", "full")} <= against
    methods = found["methods"]
    assert methods["head"]["resident_bytes"] <= methods["patch"]["resident_bytes"]
    assert methods["none"]["resident_bytes"] == 0 and methods["none"]["effective_ratio"] is None
    assert methods["full"]["effective_ratio"] == pytest.approx(1)
    assert methods["patch"]["shared_bytes"] > 0 and methods["full"]["compile_flops"] == 0
    assert {row["method"] for row in found["forgetting"]} == {"patch"}
    assert {gain["method"] for gain in found["gains"]} == {"patch", "head", "cache", "evicted"}
    # A cached document is the document: the same scores on the documents that both have.
    difference = next(
        d for d in found["differences"] if (d["method"], d["against"], d["metric"]) == ("cache", "full", "nll")
    )
    assert abs(difference["mean"]) < 1e-3


def test_a_killed_comparison_goes_on_to_the_same_results(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared(experiment, base, tmp_path / "whole").report("x")
    add, left = Cache.add, [0]

    def dying(self: Cache, key: str, value: Any) -> None:
        if left[0] == 0:
            with self.path.open("ab") as file:  # as far as the process came
                file.write(b'{"key": "half')
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, key, value)

    monkeypatch.setattr(Cache, "add", dying)
    for units in (0, 1, 5, 3):
        left[0] = units
        with pytest.raises(KeyboardInterrupt):
            compared(experiment, base, tmp_path / "killed")
    monkeypatch.setattr(Cache, "add", add)
    compared(experiment, base, tmp_path / "killed").report("x")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    runs: list[str] = []
    monkeypatch.setattr(METHODS["full"], "compile", lambda *_: runs.append("again"))
    compared(experiment, base, tmp_path / "killed").report("x")
    assert runs == []  # nothing is done twice


def test_shards_add_up_to_the_whole(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    compared(experiment, base, tmp_path / "whole").report("x")
    parts = compared(experiment, base, tmp_path / "parts", (1, 2))
    with pytest.raises(InputError, match="units are not done"):
        parts.report("x")
    assert not (tmp_path / "parts" / "results.json").exists()
    compared(experiment, base, tmp_path / "parts", (2, 2))
    whole = Comparison(read_experiment(experiment), base, tmp_path / "parts")
    whole.report("x")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_a_changed_method_is_done_again_and_the_rest_is_not(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    compared(experiment, base, tmp_path / "out")
    before = len(Cache(tmp_path / "out").records)
    experiment.write_text(experiment.read_text().replace("truncation, match", "truncation, side: tail, match"))
    comparison = compared(experiment, base, tmp_path / "out")
    assert len(comparison.cache.records) == before + 2  # the units of `head`


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("truncation", "truncate", "did you mean 'truncation'"),
        ("jsonl", "jsonk", "did you mean 'jsonl'"),
        ("match: patch", "match: pach", "no method 'pach'; did you mean 'patch'"),
        ("unit: 2", "unit: 1", "unit"),
        ("unit: 2", "units: 2", "did you mean 'unit'"),
        ("truncation, match: patch", "truncation", "needs 'match'"),
        ("items: 3", "item: 3", "did you mean 'items'"),
        ("{method: truncation, match: patch}", "{method: truncation, match: evicted}", "has a budget itself"),
        ("{method: truncation, match: patch}", "{method: truncation, side: up, match: patch}", "side"),
        ("name: tiny", "name: [", "not valid YAML"),
        ("methods:", "ways:", "it needs name, tasks and methods"),
    ],
)
def test_bad_experiments_are_one_line(experiment: Path, old: str, new: str, message: str) -> None:
    text = experiment.read_text()
    assert old in text
    experiment.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        read_experiment(experiment)
    assert "\n" not in str(caught.value)


def test_foreign_folders_are_left_alone(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no comparison"):
        compared(experiment, base, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    compared(experiment, base, tmp_path / "mine").report("x")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").glob("*.json*")}
    experiment.write_text(experiment.read_text().replace("name: tiny", "name: other"))
    with pytest.raises(InputError, match="results of experiment 'tiny'"):
        compared(experiment, base, tmp_path / "mine")
    assert {path: path.read_bytes() for path in (tmp_path / "mine").glob("*.json*")} == before


def test_flops_follow_the_formula(base: BaseModel) -> None:
    """A prefill of n tokens costs 2 N n in the layers' matrices, attention, and one row of the output layer."""
    runtime, ids = Runtime(base), document_ids(base.tokenizer, TEXT)[:60]
    memory = Memory(text=tuple(ids))
    counted = flops(lambda: runtime.generate_ids([memory], [runtime.question(0, "Who?")], 1))
    config = base.model.config
    n = len(ids) + len(runtime._prefix) + len(runtime._gap) + len(runtime.question(0, "Who?").ids)
    layers = sum(p.numel() for name, p in base.model.named_parameters() if "layers" in name and p.dim() == 2)
    head = config.hidden_size * config.vocab_size
    attention = 4 * config.num_hidden_layers * n * n * config.hidden_size
    assert counted == pytest.approx(2 * layers * n + 2 * head + attention, rel=0.02)


def test_break_even() -> None:
    assert break_even(100.0, 1.0, 0.0, 11.0) == pytest.approx(10.0)
    assert break_even(100.0, 1.0, 50.0, 11.0) == pytest.approx(5.0)
    assert break_even(100.0, 11.0, 0.0, 11.0) is None  # never cheaper
    assert break_even(10.0, 1.0, 50.0, 11.0) == 0.0  # from the first question on


def test_recovered_gain_is_not_divided_by_nothing() -> None:
    strong = recovered_gain([0.2, 0.3, 0.25, 0.25], [0.5, 0.5, 0.4, 0.6])
    assert strong["gain"] == pytest.approx(0.5) and strong["low"] < 0.5 < strong["high"] and not strong["weak"]
    lower_is_better = recovered_gain([-1.0, -1.5], [-2.0, -3.0])
    assert lower_is_better["gain"] == pytest.approx(0.5)
    weak = recovered_gain([0.2, 0.3, 0.1, 0.2], [0.3, -0.3, 0.2, -0.1])
    assert weak["weak"] and weak["gain"] is None and weak["denominator"] == pytest.approx(0.025)
    assert torch.tensor(weak["numerator"]) == pytest.approx(0.2)
