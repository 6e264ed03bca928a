"""`hyperlora judge` on the folder of a comparison, and what it and `hyperlora rate` refuse there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyperlora.evaluation.replies import read_comparisons

from .chat_server import Server, fair, killing, replies_of
from .conftest import Run, one_line
from .replies import HEAD, LINES, line, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "run", LINES)


@pytest.fixture
def judge(run: Run, server: Server) -> Run:
    return lambda *arguments: run("judge", *arguments, "--endpoint", server.url, "--model", "m")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"replies.jsonl"}


def test_a_judge_gives_a_win_rate(judge: Run, server: Server, folder: Path) -> None:
    code, out, err = judge(folder, "patch", "full")
    assert code == 0, err
    # Three of six documents with two questions each, one won and one lost; the others are won.
    assert out.count("\n") == 1 and out.startswith("patch against full: win rate 0.750 [")
    assert out.endswith("] on 6 documents; 6 wins, 3 losses, 0 ties, 0 unparsable\n")
    assert files(folder) == {"judge-cache.jsonl", "judge-patch-vs-full.json"} and len(server.bodies) == 9
    result = json.loads((folder / "judge-patch-vs-full.json").read_text())
    assert (result["methods"], result["judge"], result["wins"], result["win_rate"][0]) == (
        ["patch", "full"],
        "m",
        6,
        0.75,
    )
    assert (result["task"], result["items"], result["seed"]) == (None, None, 0)
    code, out, _ = judge(folder, "patch", "full", "--json")
    assert code == 0 and json.loads(out) == result and len(server.bodies) == 9


def test_the_second_method_loses_what_the_first_wins(judge: Run, folder: Path) -> None:
    found = json.loads(judge(folder, "full", "patch", "--json")[1])
    assert (found["wins"], found["losses"], found["win_rate"][0]) == (3, 6, 0.25)


def test_the_judge_sees_whole_lines_and_ties_and_babble_are_told(judge: Run, server: Server, folder: Path) -> None:
    said = iter(['{"choice": "tie"}', "Well ..."])
    server.answer = lambda body: next(said, None) or fair(body)
    code, out, err = judge(folder, "patch", "full", "--task", "notes")
    assert (
        code == 0 and "win rate 0.500 [0.500, 0.500] on 2 documents; 0 wins, 0 losses, 1 ties, 1 unparsable" in out
    ), err
    shown = server.bodies[1]["messages"][-1]["content"]
    for part in ("Maro is in notes,\nnumber 1.", "Who is 1.0?", "Maro\nM."):
        assert f"]\n{part}\n[end of" in shown
    assert sorted(replies_of(server.bodies[1])) == ["Jan", "Maro"]


def test_task_and_items_choose_questions(judge: Run, server: Server, folder: Path) -> None:
    def asked(*arguments: object) -> int:
        server.bodies.clear()
        result = json.loads(judge(folder, "patch", "full", "--force", "--json", "--seed", "5", *arguments)[1])
        (folder / "judge-cache.jsonl").unlink()
        assert result["comparisons"] == len(server.bodies)
        return len(server.bodies)

    assert [asked(), asked("--task", "squad"), asked("--task", "notes"), asked("--items", "4")] == [9, 7, 2, 4]
    assert asked("--task", "squad", "--items", "100") == 7


def test_the_requests_fields_can_be_chosen(judge: Run, server: Server, folder: Path) -> None:
    """For endpoints that refuse the usual ones."""
    code, _, err = judge(folder, "patch", "full", "--request", '{"max_completion_tokens": 99}')
    assert code == 0, err
    assert set(server.bodies[0]) == {"model", "messages", "max_completion_tokens"}
    assert json.loads((folder / "judge-patch-vs-full.json").read_text())["request"] == {"max_completion_tokens": 99}
    for wrong in ("temperature=0", "[1]", '{"model": "other"}'):
        code, _, err = judge(folder, "patch", "full", "--request", wrong)
        assert code != 0 and one_line(err).endswith("such as {}")


def test_methods_meet_on_what_both_were_asked_and_the_result_has_a_plain_name(
    judge: Run, server: Server, folder: Path
) -> None:
    server.answer = lambda body: '{"choice": "tie"}'
    code, out, err = judge(folder, "patch", HEAD)
    assert (
        code == 0 and out.startswith(f"patch against {HEAD}: ") and "on 4 documents; 0 wins, 0 losses, 5 ties" in out
    ), err
    path = folder / "judge-patch-vs-head_1_2_of_it.json"
    before = json.loads(path.read_text())
    assert before["methods"] == ["patch", HEAD] and len(server.bodies) == 5
    other = HEAD.replace(",", "")  # its name comes out the same
    write(folder, [each | {"replies": {**each["replies"], other: "Nobody"}} for each in LINES])
    code, _, err = judge(folder, "patch", other)
    assert code == 3 and "already exists" in one_line(err) and json.loads(path.read_text()) == before


def test_an_interrupted_run_goes_on(
    judge: Run, server: Server, folder: Path, tmp_path: Path, waits: list[float]
) -> None:
    whole = json.loads(judge(write(tmp_path / "whole", LINES), "patch", "full", "--json")[1])
    server.bodies.clear()

    def answer(body: dict[str, Any]) -> str:
        if len(server.bodies) == 4:
            server.faults = [503] * 6
        return fair(body)

    server.answer = answer
    code, out, err = judge(folder, "patch", "full")
    assert code == 3 and not out and files(folder) == {"judge-cache.jsonl"} and len(waits) == 5
    assert "4 of 9 verdicts are cached" in one_line(err) and "run again to continue" in one_line(err)
    server.bodies.clear()
    server.answer = fair
    code, out, err = judge(folder, "patch", "full", "--json")
    assert code == 0 and json.loads(out) == whole and len(server.bodies) == 5, err


def test_a_killed_run_goes_on(judge: Run, server: Server, folder: Path) -> None:
    command = [sys.executable, "-m", "hyperlora", "judge", str(folder), "patch", "full"]
    process = subprocess.Popen(
        [*command, "--endpoint", server.url, "--model", "m"], cwd=Path(__file__).parents[1], env=dict(os.environ)
    )
    server.answer = killing(server, process, 4)
    assert process.wait(300) == -signal.SIGKILL and files(folder) == {"judge-cache.jsonl"}
    server.bodies.clear()
    server.answer = fair
    assert json.loads(judge(folder, "patch", "full", "--json")[1])["wins"] == 6 and len(server.bodies) == 9 - 3


def test_a_result_of_another_setting_is_kept(judge: Run, server: Server, folder: Path, tmp_path: Path) -> None:
    judge(folder, "patch", "full")
    path = folder / "judge-patch-vs-full.json"
    before = path.read_bytes()
    for other in (["--seed", "1"], ["--task", "squad"], ["--items", "3"]):
        code, _, err = judge(folder, "patch", "full", *other)
        assert code == 3 and "already exists" in one_line(err) and "--force" in one_line(err)
    path.write_text("my notes")
    code, _, err = judge(folder, "patch", "full")
    assert code == 3 and path.read_text() == "my notes"
    path.write_bytes(before)
    assert len(server.bodies) == 9  # all of this was found out before the judge was asked
    code, _, err = judge(folder, "patch", "full", "--task", "squad", "-o", tmp_path / "squad.json")
    assert code == 0 and path.read_bytes() == before and json.loads((tmp_path / "squad.json").read_text())["wins"] == 4
    assert judge(folder, "patch", "full", "--task", "squad", "--force")[0] == 0 and path.read_bytes() != before
    code, _, err = judge(folder, "patch", "full", "--seed", "9", "-o", tmp_path / "none" / "x.json")
    assert code == 3 and "no directory" in one_line(err) and len(server.bodies) == 9


def test_the_key_comes_from_the_environment_and_stays_out_of_the_folder(
    judge: Run, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERLORA_JUDGE_KEY", "sk-secret-0123")
    code, out, err = judge(folder, "patch", "full")
    assert code == 0 and set(server.keys) == {"Bearer sk-secret-0123"}
    written = "".join((folder / name).read_text() for name in files(folder))
    assert "sk-secret" not in written + out + err


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no object": (lambda good: [good], "line 3: Input should be an object"),
    "no text": (lambda good: {key: good[key] for key in good if key != "text"}, "line 3: the key 'text' is missing"),
    "a number": (lambda good: good | {"document": 7}, "line 3: document: Input should be a valid string (got 7)"),
    "one answer": (lambda good: good | {"accepted": "Maro"}, "line 3: accepted: Input should be a valid"),
    "no reply": (
        lambda good: good | {"replies": {"patch": None}},
        "line 3: replies.patch: Input should be a valid",
    ),
}


@pytest.mark.parametrize("command", ["judge", "export"])
@pytest.mark.parametrize("name", [*BROKEN, "cut"])
def test_a_broken_line_is_named(
    judge: Run, run: Run, server: Server, folder: Path, tmp_path: Path, name: str, command: str
) -> None:
    path = folder / "replies.jsonl"
    if name == "cut":
        path.write_text(path.read_text()[:-30])
        message = "line 9: Invalid JSON"
    else:
        spoil, message = BROKEN[name]
        write(folder, [*LINES[:2], spoil(LINES[2]), *LINES[3:]])
    if command == "judge":  # the first question alone would have been well
        code, out, err = judge(folder, "patch", "full", "--items", "1")
    else:
        code, out, err = run("rate", "export", folder, "patch", "full", "-o", tmp_path / "s.csv", "--items", "1")
    assert code == 3 and not out and f"{path}, {message}" in one_line(err)
    assert not files(folder) and not server.bodies and list(tmp_path.iterdir()) == [folder]


def test_what_is_not_there_is_named_with_what_is(judge: Run, run: Run, server: Server, folder: Path) -> None:
    def refused(message: str, *arguments: object) -> None:
        for call in (judge, lambda *given: run("rate", "export", *given, "-o", folder / "sheet.csv")):
            code, out, err = call(*arguments)
            assert code == 3 and not out and message in one_line(err), err
        assert not server.bodies and not files(folder)

    refused("no method 'patches'; did you mean 'patch'?", folder, "patches", "full")
    refused("no method 'Full'; did you mean 'full'?", folder, "patch", "Full")
    refused(f"no method 'zzz'; known: full, {HEAD}, patch", folder, "patch", "zzz")
    refused("no task 'squat'; did you mean 'squad'?", folder, "patch", "full", "--task", "squat")
    refused("both methods are 'patch'", folder, "patch", "patch")
    refused("replies.jsonl is missing; run `hyperlora compare", folder.parent / "none", "patch", "full")
    only = [LINES[0] | {"replies": {"patch": "Maro"}}, LINES[1] | {"replies": {"full": "Maro"}}]
    refused("no question was asked of both 'patch' and 'full'", write(folder, only), "patch", "full")
    refused("replies.jsonl is empty", write(folder, []), "patch", "full")


def test_ids_stay_when_the_comparison_grows(folder: Path) -> None:
    twice = [LINES[1], LINES[1], *LINES[3:]]  # one question may be asked twice of a document
    before = read_comparisons(write(folder, twice), "patch", "full")
    ids = [comparison.id for comparison in before]
    assert len(set(ids)) == len(twice)
    grown = [line("a new task", 1, 0), *({**each, "replies": {"new": "Jan", **each["replies"]}} for each in twice)]
    assert [comparison.id for comparison in read_comparisons(write(folder, grown), "patch", "full")][1:] == ids
