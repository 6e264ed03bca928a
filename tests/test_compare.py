import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.base_model import BaseModel, load_base
from hyperlora.compare.cache import Cache
from hyperlora.compare.costs import break_even, flops, measure_costs
from hyperlora.compare.experiment import read_experiment
from hyperlora.compare.gain import recovered_gain
from hyperlora.compare.run import Comparison
from hyperlora.compare.teacher import teacher_replies
from hyperlora.compare.units import units
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.memory import Memory
from hyperlora.methods import METHODS
from hyperlora.prompt import GAP, document_ids, encode
from hyperlora.runtime import Prompt, Runtime

from .conftest import TEXT, make_base, make_generator

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
    (tmp_path / "unrelated.jsonl").write_text(json.dumps({"id": "u", "text": TEXT[::-1]}) + "\n")
    path = tmp_path / "experiment.yaml"
    path.write_text(f"""
name: tiny
base: tiny
seeds: [0, 1]
unit: 2
tasks:
  notes: {{task: jsonl, path: {tmp_path / "data.jsonl"}, max_new_tokens: 4}}
methods:
  patch: {{method: generator, path: {tmp_path / "generator"}}}
  head: {{method: truncation, match: patch}}
  cache: {{method: kv_cache, items: 3}}
  evicted: {{method: random_eviction, match: patch}}
unrelated: {tmp_path / "unrelated.jsonl"}
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
    read = read_experiment(experiment)
    assert read.adapted == "adapted full" and read.methods["adapted full"].method == "adapted_full"


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


def test_the_cached_document_is_found_whatever_its_label_is(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    compared(experiment, base, tmp_path / "out").report("")
    methods = results(tmp_path / "out")["methods"]
    assert methods["patch"]["break_even"]["cached KV"] is not None


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


def test_a_killed_comparison_goes_on_to_the_same_results(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared(experiment, base, tmp_path / "whole").report("x")
    add, left = Cache.add, [0]

    def dying(self: Cache, records: dict[str, Any]) -> None:
        if left[0] == 0:
            with self.path.open("ab") as file:  # as far as the process came
                file.write(b'{"key": "half')
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, records)

    monkeypatch.setattr(Cache, "add", dying)
    for done in (0, 1, 5, 3):
        left[0] = done
        with pytest.raises(KeyboardInterrupt):
            compared(experiment, base, tmp_path / "killed")
    monkeypatch.setattr(Cache, "add", add)
    compared(experiment, base, tmp_path / "killed").report("x")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    runs: list[str] = []
    monkeypatch.setattr(METHODS["full"], "compile", lambda *_: runs.append("again"))
    compared(experiment, base, tmp_path / "killed").report("x")
    assert runs == []  # nothing is done twice


def test_a_process_killed_at_any_time_goes_on_to_the_same_results(
    experiment: Path, tiny_dirs: tuple[str, str], tmp_path: Path
) -> None:
    """SIGKILL while it answers, and while it measures costs for the report."""
    base, generator = tiny_dirs
    experiment.write_text(experiment.read_text().replace(str(tmp_path / "generator"), generator))

    def run(folder: Path, records: int | None = None) -> None:
        """To the end, or until there are so many records."""
        command = ["-m", "hyperlora", "compare", str(experiment), "--base", base, "--device", "cpu", "-o", str(folder)]
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        file = folder / "records-whole.jsonl"
        while records is not None and not (file.exists() and file.read_bytes().count(b"\n") >= records):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        if records is not None:
            process.kill()
        _, errors = process.communicate()
        assert process.returncode == (0 if records is None else -signal.SIGKILL), errors.decode()[-2000:]

    run(tmp_path / "whole")
    total = (tmp_path / "whole" / "records-whole.jsonl").read_bytes().count(b"\n")
    for records in (1, total // 2, total - 3):
        run(tmp_path / "killed", records)
        assert not (tmp_path / "killed" / "results.json").exists()
    run(tmp_path / "killed")
    assert results(tmp_path / "killed") | {"command": ""} == results(tmp_path / "whole") | {"command": ""}


def test_shards_add_up_to_the_whole(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    compared(experiment, base, tmp_path / "whole").report("x")
    parts = compared(experiment, base, tmp_path / "parts", (1, 2))
    with pytest.raises(InputError, match="documents are not done"):
        parts.report("x")
    assert not (tmp_path / "parts" / "results.json").exists()
    compared(experiment, base, tmp_path / "parts", (2, 2))
    whole = Comparison(read_experiment(experiment), base, tmp_path / "parts")
    whole.report("x")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_every_rank_of_a_launcher_does_a_shard(experiment: Path, tiny_dirs: tuple[str, str], tmp_path: Path) -> None:
    """torchrun with two processes gives the results of one; the first reports."""
    base, generator = tiny_dirs
    text = experiment.read_text().replace(str(tmp_path / "generator"), generator)
    experiment.write_text(text.replace("forgetting_documents: 3", "forgetting_documents: 0"))
    command = ["-m", "hyperlora", "compare", str(experiment), "--base", base, "--device", "cpu", "-o"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command, str(tmp_path / "ranks")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines().count(str(tmp_path / "ranks" / "results.json")) == 1
    assert len(list((tmp_path / "ranks").glob("records-?-of-2.jsonl"))) == 2
    compared(experiment, load_base(base, device="cpu"), tmp_path / "whole").report("x")
    whole, ranks = results(tmp_path / "whole"), results(tmp_path / "ranks")
    one, other = ([score["mean"] for score in found["scores"]] for found in (whole, ranks))
    assert one == pytest.approx(other, abs=1e-3) and len(one) > 50


def test_a_changed_method_is_done_again_and_the_rest_is_not(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    compared(experiment, base, tmp_path / "out")
    before = len(Cache(tmp_path / "out").records)
    experiment.write_text(experiment.read_text().replace("truncation, match", "truncation, side: tail, match"))
    comparison = compared(experiment, base, tmp_path / "out")
    assert len(comparison.cache.records) == before + 5  # the documents of `head`


def test_a_changed_document_is_done_again_and_the_rest_is_not(
    experiment: Path, base: BaseModel, tmp_path: Path
) -> None:
    """With the one before it, whose swapped control it is."""
    comparison = compared(experiment, base, tmp_path / "out")
    group = next(unit for unit, _ in comparison.keyed() if len(unit.items) == 3).items
    changed, before = group[1].text, set(comparison.cache.records)
    path = tmp_path / "data.jsonl"
    path.write_text(path.read_text().replace(changed, changed.replace("Note", "Remark")))
    new = compared(experiment, base, tmp_path / "out").cache.records
    documents = [new[key]["document"] for key in set(new) - before if isinstance(new[key], dict)]
    again = {name: documents.count(name) for name in documents}
    assert set(again) == {group[0].id, group[1].id}
    assert set(again.values()) == {4 + 2}  # full, none, patch, head, and two seeds of evicted


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
        ("unit: 2", "curves: {c: [patch, hed]}", "curves: c: no method 'hed'; did you mean 'head'"),
        ("unit: 2", "curves: {c: [patch]}", "curves"),
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
    before = encode(base.tokenizer, base.prompt.prefix)
    n = len(ids) + len(before) + len(encode(base.tokenizer, GAP)) + len(runtime.question(0, "Who?").ids)
    layers = sum(p.numel() for name, p in base.model.named_parameters() if "layers" in name and p.dim() == 2)
    head = config.hidden_size * config.vocab_size
    attention = 4 * config.num_hidden_layers * n * n * config.hidden_size
    assert counted == pytest.approx(2 * layers * n + 2 * head + attention, rel=0.02)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a peak of memory")
def test_peak_memory_is_that_of_the_work(base: BaseModel) -> None:
    """Forty MiB held while compiling are seen, as memory above what was there before."""

    class Hungry(METHODS["none"]):  # type: ignore[misc, valid-type]
        held = 0

        def compile(self, *_: Any) -> list[Memory]:
            held = [torch.ones(2**14) for _ in range(16 * self.held)]  # small pieces, which the allocator keeps
            return [Memory()] * int(len(held) > -1)

    item = Item("a", "Text.", (Question("Who?", "I", ("I",)),))
    peaks = {}
    for size in (0, 40):
        method = Hungry(base, None)
        method.held = size
        peaks[size] = measure_costs(method, None, [item], 2, Runtime(base))["timing"]["peak_mib"]
    assert 35 < peaks[40] < 80 and peaks[0] < 20


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
