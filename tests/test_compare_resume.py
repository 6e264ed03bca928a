"""A comparison that was stopped, killed, cut into shards or changed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyperlora.base_model import BaseModel, load_base
from hyperlora.compare.cache import Cache
from hyperlora.compare.experiment import read_experiment
from hyperlora.compare.run import Comparison
from hyperlora.errors import InputError
from hyperlora.memory import Memory
from hyperlora.methods import METHODS

from .comparisons import compared, results
from .conftest import Run

pytest.importorskip("matplotlib")


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


def test_no_shard_makes_a_memory_for_its_bytes_that_another_has_finished(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are learned from all that is in the folder; what is unknown still is made once, and nothing beside it."""
    kind, compiled = METHODS["generator"], []
    made = kind.compile

    def counted(self: Any, documents: Any, budgets: Any = None) -> list[Memory]:
        compiled.append({document.id for document in documents})
        return made(self, documents, budgets)

    monkeypatch.setattr(kind, "compile", counted)
    experiment.write_text(experiment.read_text().replace("match: patch}", "match: patch, unit: 5}"))
    read, folder = read_experiment(experiment), tmp_path / "out"
    first, second = (Comparison(read, base, folder, (index, 2)) for index in (1, 2))  # at the same time
    ids = [item.id for item in first.items["notes"]]
    groups = [set(ids[:2]), set(ids[2:])]
    first.run()  # the patches of the first group, and `head` and `evicted` of all documents
    assert compiled == groups
    compiled.clear()
    second.run()  # the patches of the second group, and `evicted` of all documents
    assert compiled == groups[1:]
    compiled.clear()
    Comparison(read, base, folder).report("x")
    assert compiled == [{ids[0]}, {ids[0]}]  # for its own costs: counted, and timed


def test_shards_of_the_command_add_up(run: Run, experiment: Path, tiny_dirs: tuple[str, str], tmp_path: Path) -> None:
    experiment.write_text(experiment.read_text().replace(str(tmp_path / "generator"), tiny_dirs[1]))
    arguments = ["compare", experiment, "--base", tiny_dirs[0], "-o", tmp_path / "out"]
    code, out, err = run(*arguments, "--shard", "2/2")
    assert code == 0 and not out and "shard 2/2 is done" in err
    code, _, err = run(*arguments, "--shard", "3/2")
    assert code == 3 and "3/2" in err
    code, _, err = run(*arguments, "--shard", "1/2")
    assert code == 0 and not (tmp_path / "out" / "results.json").exists(), err
    code, out, err = run(*arguments, "--device", "cpu", "--dtype", "float32")
    assert code == 0 and str(tmp_path / "out" / "report.html") in out.splitlines(), err
    assert shlex.split(results(tmp_path / "out")["command"]) == [
        *("hyperlora", "compare", str(experiment), "-o", str(tmp_path / "out")),
        *("--base", tiny_dirs[0], "--device", "cpu", "--dtype", "float32"),
    ]


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_every_rank_of_a_launcher_does_a_shard(
    experiment: Path, tiny_dirs: tuple[str, str], tmp_path: Path, name: str
) -> None:
    """Two processes give the results of one; the first reports."""
    base, generator = tiny_dirs
    text = experiment.read_text().replace(str(tmp_path / "generator"), generator)
    experiment.write_text(text.replace("forgetting_documents: 3", "forgetting_documents: 0"))
    command = ["hyperlora", "compare", str(experiment), "--base", base, "--device", "cpu", "-o"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    if name == "deepspeed":
        pytest.importorskip("deepspeed")
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--module"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
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


def test_a_changed_text_for_forgetting_is_measured_again(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    before = {key for _, keys in compared(experiment, base, tmp_path / "out").keyed() for key in keys}
    path = tmp_path / "unrelated.jsonl"
    path.write_text(path.read_text().replace('"text": "', '"text": "Another '))
    comparison = Comparison(read_experiment(experiment), base, tmp_path / "out")
    assert not before & {key for _, keys in comparison.keyed() for key in keys}


def test_foreign_folders_are_left_alone(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no comparison"):
        compared(experiment, base, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    compared(experiment, base, tmp_path / "mine").report("x")
    before = {path: path.read_bytes() for path in (tmp_path / "mine").glob("*.json*")}
    mine = experiment.read_text()
    for old, new in (("name: tiny", "name: other"), ("notes: {task: jsonl", "letters: {task: jsonl")):
        experiment.write_text(mine.replace(old, new))
        with pytest.raises(InputError, match="results of experiment 'tiny'"):
            compared(experiment, base, tmp_path / "mine")
    experiment.write_text(mine)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="another prompt format"):
        patch.setattr(base, "prompt", replace(base.prompt, question="Q: {question}"))
        compared(experiment, base, tmp_path / "mine")
    assert {path: path.read_bytes() for path in (tmp_path / "mine").glob("*.json*")} == before
    (tmp_path / "mine" / "experiment.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        compared(experiment, base, tmp_path / "mine")


def test_a_folder_goes_on_with_the_same_tasks_only(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    """Methods, tasks and documents may come and go. What two experiments call alike must be one task."""
    folder, text = tmp_path / "out", experiment.read_text()
    task = next(line for line in text.splitlines() if "notes:" in line)
    shutil.copy(tmp_path / "data.jsonl", tmp_path / "other.jsonl")

    def begin(content: str) -> None:
        experiment.write_text(content)
        Comparison(read_experiment(experiment), base, folder)

    experiment.write_text(text)
    compared(experiment, base, folder).report("x")
    begin(text.replace(task, f"{task}\n{task.replace('notes', 'letters')}"))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    elsewhere = task.replace("data.jsonl", "other.jsonl")
    one_of_two = f"{task}\n{elsewhere.replace('notes', 'letters')}"
    for tasks in (elsewhere, one_of_two, task.replace("tokens: 4", "tokens: 5")):
        with pytest.raises(
            InputError, match=r"results of experiment 'tiny' on .* whose task '(notes|letters)' is another"
        ):
            begin(text.replace(task, tasks))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    begin(text.replace(task, task.replace("max_new", "items: 3, max_new")))
    begin(text.replace(task, task.replace("max_new", "seed: 0, max_new")))  # which it is without a word
    begin(text.replace("  cache: {method: kv_cache, items: 3}\n", ""))
