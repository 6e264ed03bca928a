"""Experiments, and what a comparison finds."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.base_model import DEFAULT_BASE, BaseModel, BaseNotFound
from hyperlora.compare.costs import measure_costs
from hyperlora.compare.experiment import read_experiment
from hyperlora.compare.reply_scores import _reader
from hyperlora.compare.run import Comparison
from hyperlora.compare.teacher import teacher_replies
from hyperlora.compare.units import units
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.evaluation.gain import recovered_gain
from hyperlora.memory import Memory
from hyperlora.methods import METHODS, Method
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime

from .comparisons import compared, results
from .conftest import make_base

pytest.importorskip("matplotlib")


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
    assert {("patch", "none"), ("patch", "full"), ("patch", "swapped"), ("patch", "head"), ("cache", "full")} <= against
    assert ("patch", "evicted") not in against and ("head", "head") not in against
    methods = found["methods"]
    assert methods["head"]["resident_bytes"] <= methods["patch"]["resident_bytes"]
    assert methods["none"]["resident_bytes"] == 0 and methods["none"]["effective_ratio"] is None
    assert methods["full"]["effective_ratio"] == pytest.approx(1)
    assert methods["patch"]["shared_bytes"] > 0 and methods["full"]["compile_flops"] == 0
    assert {row["method"] for row in found["forgetting"]} == {"patch"}
    source = str(tmp_path / "unrelated.jsonl")
    assert found["unrelated"] == {"source": source, "tokens": 256, "windows": 3, "behind": base.prompt.prefix}
    assert found["costs"] == {"task": "notes", "documents": 1, "tokens": 3}
    assert methods["evicted"]["seeds"] == [0, 1] and methods["patch"]["seeds"] == []
    forgotten = {row["measure"]: row["mean"] for row in found["forgetting"]}
    ratio = [forgotten[f"perplexity on unrelated text, {state}"] for state in ("patched", "bare")]
    assert forgotten["loss on unrelated text, patch on minus bare"] == pytest.approx(math.log(ratio[0] / ratio[1]))
    assert ratio[0] != ratio[1]
    assert "the control is missing" in next(f["reason"] for f in found["flags"] if f["method"] == "all methods")
    assert {gain["method"] for gain in found["gains"]} == {"patch", "head", "cache", "evicted"}
    # A cached document is the document: the same scores on the documents that both have.
    difference = next(
        d for d in found["differences"] if (d["method"], d["against"], d["metric"]) == ("cache", "full", "nll")
    )
    assert abs(difference["mean"]) < 1e-3


def test_controls_are_added_where_they_are_missing(experiment: Path) -> None:
    text = experiment.read_text().replace("head: {method: truncation, match: patch}", "")
    assert text != experiment.read_text()
    experiment.write_text(text)
    methods = read_experiment(experiment, "another/base").methods
    assert list(methods) == ["full", "none", "patch", "cache", "evicted", "patch's bytes of text"]
    assert methods["patch's bytes of text"].match == "patch" and methods["patch's bytes of text"].items is None
    both = text.replace("evicted: {", "few: {method: distillation, items: 2}\n  evicted: {")
    experiment.write_text(both)
    assert read_experiment(experiment, "another/base").methods["few's bytes of text"].items == 2
    experiment.write_text(text.replace("base: tiny\n", ""))  # the default base has an adapted full context
    for named in (None, DEFAULT_BASE):
        read = read_experiment(experiment, named)
        assert read.adapted == "adapted full" and read.methods["adapted full"].method == "adapted_full"


def test_every_size_of_a_method_has_its_bytes_of_text(experiment: Path) -> None:
    text = experiment.read_text().replace("head: {method: truncation, match: patch}", "{}")
    rows = (
        "one: {method: distillation}\n  two: {method: distillation, steps: 3}\n  three: {method: distillation, rank: 8}"
    )
    experiment.write_text(text.replace("  {}\n", f"  {rows}\n"))
    methods = read_experiment(experiment, "another/base").methods
    assert [label.split("'")[0] for label in methods if label.endswith("bytes of text")] == ["patch", "one", "three"]


def test_replies_are_read_without_their_end(base: BaseModel) -> None:
    """A reply of the greatest length has none, and must not pay for it."""
    item = Item("x", "A note about Brno.", (Question("Where?", "Brno", ("Brno",)),))
    ((found,),) = _reader(base, None)([item], [[["in Brno"]]])
    runtime = Runtime(base)
    prompt = runtime.question(0, "Where?", "in Brno")
    (scores,) = runtime.log_likelihood([Memory(text=tuple(document_ids(base.tokenizer, item.text)))], [prompt])
    assert found == [pytest.approx(-float(scores[:-1].mean()))]
    assert all(math.isfinite(loss) for loss in _reader(base, None)([item], [[[""]]])[0][0])


def test_a_slow_method_has_units_of_its_own(experiment: Path) -> None:
    experiment.write_text(experiment.read_text().replace("{method: kv_cache, items: 3}", "{method: kv_cache, unit: 4}"))
    read = read_experiment(experiment)
    items = [Item(str(number), "Text.", ()) for number in range(8)]
    found = [unit for unit in units(read, {"notes": items}) if unit.seed == 0]
    sizes = {label: [len(unit.items) for unit in found if unit.method == label] for label in ("cache", "head")}
    assert sizes == {"cache": [4, 4], "head": [2, 2, 2, 2]}
    forgetting = [unit.forgetting for unit in found if unit.method == "cache"]
    assert forgetting == [3, 0]


def test_a_control_keeps_its_name(experiment: Path) -> None:
    experiment.write_text(experiment.read_text().replace("  head: {method: trunc", "  full: {method: trunc"))
    with pytest.raises(InputError, match="method full: the name is the control's"):
        read_experiment(experiment)


def test_bytes_to_match_come_from_what_is_finished(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, compiled = METHODS["generator"], []
    made = kind.compile

    def counted(self: Any, documents: Any, budgets: Any = None) -> list[Memory]:
        compiled.extend(document.id for document in documents)
        return made(self, documents, budgets)

    monkeypatch.setattr(kind, "compile", counted)
    compared(experiment, base, tmp_path / "out")
    assert sorted(compiled) == [f"doc-{number}" for number in range(5)]


def test_text_for_forgetting_is_looked_at_before_anything_is_done(
    experiment: Path, base: BaseModel, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for source, message in (
        ("wikitxt2_test", "unknown data source"),
        (str(tmp_path / "empty.txt"), "no text|is empty"),
    ):
        read = read_experiment(experiment).model_copy(update={"unrelated": source})
        with pytest.raises(InputError, match=message):
            Comparison(read, base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        Comparison(read.model_copy(update={"forgetting_documents": 0}), base, tmp_path / "without")


def test_what_the_report_needs_is_looked_for_before_anything_is_done(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = experiment.read_text()
    experiment.write_text(text + f"readers: {{other: {tmp_path / 'nothing.gguf'}}}\n")
    with pytest.raises(BaseNotFound, match="no such file"):
        Comparison(read_experiment(experiment), base, tmp_path / "out")
    experiment.write_text(text + "metrics: [bert_score]\n")
    monkeypatch.setattr("hyperlora.evaluation.bert_score._PACKAGE", "not_installed")
    with pytest.raises(InputError, match="needs an encoder"):
        Comparison(read_experiment(experiment), base, tmp_path / "out")
    experiment.write_text(text)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"hyperlora\[eval\]"):
        Comparison(read_experiment(experiment), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_cached_document_is_found_whatever_its_label_is(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    compared(experiment, base, tmp_path / "out").report("")
    methods = results(tmp_path / "out")["methods"]
    assert methods["patch"]["break_even"]["cached KV"] is not None
    assert methods["full"]["break_even"]["cached KV"] is None  # one question costs as much already


def test_costs_of_a_random_method_are_those_of_its_first_seed(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, int]] = []

    def measure(method: Method, *given: Any) -> dict[str, Any]:
        measured.append((method.name, method.seed))
        return measure_costs(method, *given)

    monkeypatch.setattr("hyperlora.compare.run.measure_costs", measure)
    text = experiment.read_text()
    compared(experiment, base, tmp_path / "out").report("x")
    assert len(measured) == 6
    for seeds, again in (("[0]", []), ("[4]", [("random_eviction", 4)]), ("[4, 1]", [])):
        measured.clear()
        experiment.write_text(text.replace("random_eviction,", f"random_eviction, seeds: {seeds},"))
        compared(experiment, base, tmp_path / "out").report("x")
        assert measured == again


def test_a_slow_method_may_have_seeds_of_its_own(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    def seeds(label: str) -> set[int]:
        comparison = Comparison(read_experiment(experiment), base, tmp_path / "out")
        return {unit.seed for unit, _ in comparison.keyed() if unit.method == label}

    assert seeds("evicted") == {0, 1} and seeds("patch") == {0}  # nothing about a patch is random
    experiment.write_text(experiment.read_text().replace("random_eviction,", "random_eviction, seeds: [4],"))
    assert seeds("evicted") == {4}


def test_the_teacher_is_the_model_with_the_document(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    """Its replies are the greedy ones, `full` scores them as a pass of its own does, and likelier than without or with
    another document."""
    comparison = compared(experiment, base, tmp_path / "out")
    comparison.report("x")
    scores = {
        (s["method"], s["condition"]): s for s in results(tmp_path / "out")["scores"] if s["metric"] == "teacher_nll"
    }
    item = comparison.items["notes"][0]
    runtime, memory = Runtime(base), Memory(text=tuple(document_ids(base.tokenizer, item.text)))
    prompt = runtime.question(0, item.questions[0].text)
    reply = runtime.generate_ids([memory], [prompt], 4)[0]
    taught = teacher_replies([item], 4, runtime, comparison.cache)
    assert len(taught[0]) == len(item.questions) and taught[0][0][: len(reply)] == reply
    assert len(taught[0][0]) == 4 or taught[0][0][-1] in base.stop_ids
    losses = runtime.log_likelihood([memory], [Prompt(0, prompt.ids, taught[0][0])])[0]
    record = next(
        record
        for unit, keys in comparison.keyed()
        if unit.method == "full"
        for record in map(comparison.cache.__getitem__, keys)
        if record["document"] == item.id
    )
    assert record["own"]["teacher_nll"][0] == pytest.approx(-float(losses.mean()), rel=1e-4)
    assert scores["full", "own"]["mean"] < scores["none", "own"]["mean"]
    assert scores["full", "own"]["mean"] < scores["full", "swapped"]["mean"]


def test_replies_and_curves_and_further_scores(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERTScore of the replies, their loss for the base and for another reader, curves, and every reply in a file."""
    log = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "evaluation": "facts-2", "patch_f1": 0.1},
        {"step": 9, "evaluation": "facts-2", "patch_f1": 0.4},
    ]
    lines += [{"step": step, "loss": 3.0 - 0.1 * step} for step in range(1, 10)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment.write_text(
        experiment.read_text()
        + f"""
metrics: [bert_score]
readers: {{same: null, other: some/reader}}
curves: {{cheap to dear: [head, patch]}}
training: {{patch: {log}}}
"""
    )
    other, loads = make_base(seed=5), []
    monkeypatch.setattr("hyperlora.compare.reply_scores.load_base", lambda name, **_: loads.append(name) or other)
    monkeypatch.setattr("hyperlora.compare.reply_scores.check_base", lambda _: None)
    comparison = compared(experiment, base, tmp_path / "out")
    comparison.report("x")
    found = results(tmp_path / "out")
    scores = {(s["method"], s["condition"], s["metric"]): s["mean"] for s in found["scores"]}
    assert loads == ["some/reader"]
    for method in ("full", "patch"):
        assert scores[method, "own", "reply_nll_same"] != scores[method, "own", "reply_nll_other"]
        assert -1 <= scores[method, "own", "bert_score"] <= 1
    # The whole document's replies are the reader's own greedy ones: it finds them likelier than another model does.
    assert scores["full", "own", "reply_nll_same"] < scores["full", "own", "reply_nll_other"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").read_text().splitlines()]
    assert len(rows) == 5 + 2 and set(rows[0]["replies"]) == {"full", "none", "patch", "head", "cache", "evicted"}
    assert sum("cache" in row["replies"] for row in rows) == 4  # of the three documents that it ran on
    seconds = [c for c in found["curves"] if c["x"] == "seconds" and c["metric"] == "nll"]
    assert [point[0] for point in seconds[0]["points"]] == ["head", "patch"]
    assert seconds[0]["points"][1][1] == pytest.approx(scores["patch", "own", "nll"])
    steps = {(c["task"], c["metric"]): c["points"] for c in found["curves"] if c["x"] == "steps"}
    assert steps["facts-2", "patch_f1"] == [[0, 0.1, None, None], [9, 0.4, None, None]]
    assert steps["training", "nll"][0][:2] == [1, pytest.approx(2.9)]
    report = (tmp_path / "out" / "results.md").read_text()
    assert "cheap to dear" in report and "reply_nll_other" in report.replace("\\", "")
    comparison.report("x")
    assert loads == ["some/reader"]  # kept in the cache


def test_a_reader_whose_files_have_changed_reads_again(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, loads = tmp_path / "reader", []
    reader.mkdir()
    (reader / "config.json").write_text("{}")
    experiment.write_text(experiment.read_text() + f"\nreaders: {{other: {reader}}}\n")
    other = make_base(seed=5)
    monkeypatch.setattr("hyperlora.compare.reply_scores.load_base", lambda name, **_: loads.append(name) or other)
    monkeypatch.setattr("hyperlora.compare.reply_scores.check_base", lambda _: None)
    comparison = compared(experiment, base, tmp_path / "out")
    for weights, read in (("one", 1), ("one", 1), ("two", 2)):
        (reader / "model.safetensors").write_text(weights)
        comparison.report("x")
        assert len(loads) == read


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("truncation", "truncate", "did you mean 'truncation'"),
        ("jsonl", "jsonk", "did you mean 'jsonl'"),
        ("match: patch", "match: pach", "no method 'pach'; did you mean 'patch'"),
        ("unit: 2", "unit: 1", "unit"),
        ("unit: 2", "units: 2", "did you mean 'unit'"),
        ("unit: 2", "metrics: [bert_scores]", "did you mean 'bert_score'"),
        ("unit: 2", "adapted: pach", "adapted: no method 'pach'"),
        ("unit: 2", "adapted: patch", "patch does not read with an adapted model"),
        ("unit: 2", "curves: {c: [patch, hed]}", "curves: c: no method 'hed'; did you mean 'head'"),
        ("unit: 2", "curves: {c: [patch]}", "curves"),
        ("truncation, match: patch", "truncation", "needs 'match'"),
        ("items: 3", "item: 3", "did you mean 'items'"),
        ("{method: truncation, match: patch}", "{method: truncation, match: evicted}", "has a budget itself"),
        ("{method: truncation, match: patch}", "{method: truncation, side: up, match: patch}", "side"),
        ("name: tiny", "name: [", "not valid YAML"),
        ("truncation, match: patch", "truncation, match: [patch]", "match"),
        ("  head: {", "  adapted full: {", "the name is the control's"),
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


def test_a_document_beyond_the_window_is_named(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    """At once, before anything is written."""
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("Note 3.", "Note 3. " * 600))
    with pytest.raises(InputError, match=r"task notes, document doc-3: \d+ tokens .* window of 2048") as caught:
        compared(experiment, base, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_committed_experiments_can_be_read() -> None:
    found = [read_experiment(path) for path in sorted((Path(__file__).parent.parent / "eval").glob("*.yaml"))]
    assert found and all(experiment.adapted == "adapted full" for experiment in found)


def test_recovered_gain_is_not_divided_by_nothing() -> None:
    strong = recovered_gain([0.2, 0.3, 0.25, 0.25], [0.5, 0.5, 0.4, 0.6])
    assert strong["gain"] == pytest.approx(0.5) and strong["low"] < 0.5 < strong["high"] and not strong["weak"]
    lower_is_better = recovered_gain([-1.0, -1.5], [-2.0, -3.0])
    assert lower_is_better["gain"] == pytest.approx(0.5)
    weak = recovered_gain([0.2, 0.3, 0.1, 0.2], [0.3, -0.3, 0.2, -0.1])
    assert weak["weak"] and weak["gain"] is None and weak["denominator"] == pytest.approx(0.025)
    assert torch.tensor(weak["numerator"]) == pytest.approx(0.2)
