import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hyperlora.errors import InputError
from hyperlora.evaluation.comparison import Comparison, first_is_a
from hyperlora.evaluation.endpoint import Endpoint
from hyperlora.evaluation.judge import judge, parse_choice

from .chat_server import Server, fair, killing, replies_of

SECRET = "sk-secret-0123456789"
# The first method is right in all but every fourth.
COMPARISONS = [
    Comparison(
        f"q{i}", f"Document {i // 2}.", f"Who is {i}?", ("Maro",), *(("Jan", "Maro") if i % 4 == 3 else ("Maro", "Jan"))
    )
    for i in range(16)
]


def test_the_win_rate_undoes_the_order(server: Server, tmp_path: Path) -> None:
    found = judge(COMPARISONS, Endpoint(server.url, "m"), tmp_path / "new" / "cache.jsonl")
    assert (found["wins"], found["losses"], found["ties"], found["unparsable"]) == (12, 4, 0, 0)
    assert found["win_rate"][0] == 0.75 and found["win_rate"][1] < 0.75 < found["win_rate"][2]
    assert found["documents"] == 8 and found["comparisons"] == 16 and found["failed_attempts"] == 0
    shown = [
        replies_of(body)[0] == comparison.first for body, comparison in zip(server.bodies, COMPARISONS, strict=True)
    ]
    assert shown == [first_is_a(comparison, 0) for comparison in COMPARISONS] and 3 <= sum(shown) <= 13
    assert shown != [first_is_a(comparison, 1) for comparison in COMPARISONS]
    body = server.bodies[5]
    assert body["model"] == "m" and body["temperature"] == 0
    assert all(part in body["messages"][-1]["content"] for part in ("Document 2.", "Who is 5?", "Maro", "Jan"))


def test_a_judge_that_goes_by_the_order_shows(server: Server, tmp_path: Path) -> None:
    server.answer = lambda body: '{"choice": "A"}'
    found = judge(COMPARISONS, Endpoint(server.url, "m"), tmp_path / "cache.jsonl")
    firsts = sum(first_is_a(comparison, 0) for comparison in COMPARISONS)
    assert (found["chose_a"], found["wins"], found["losses"]) == (16, firsts, 16 - firsts)


def test_ties_and_babble_count_half_and_apart(server: Server, tmp_path: Path) -> None:
    said = iter(['{"choice": "tie"}', "Both are fine.", None, '{"choice": "C"}', '{"choice": "Tie"}'])
    server.answer = lambda body: next(said, None) if len(server.bodies) <= 5 else fair(body)
    found = judge(COMPARISONS, Endpoint(server.url, "m"), tmp_path / "cache.jsonl")
    assert (found["ties"], found["unparsable"], found["wins"], found["losses"]) == (2, 3, 8, 3)
    assert found["win_rate"][0] == pytest.approx((8 + 5 / 2) / 16)


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ('{"reason": "x", "choice": "B"}', "B"),
        ('Sure:\n```json\n{"reason": "a {brace}", "choice": " b "}\n```', "B"),
        ('{"reason": "A is {\\"choice\\": \\"A\\"}", "choice": "tie"}', "tie"),
        ('{"choice": "A"} No, wait. {"choice": "B"} {"choice": 3}', "B"),
        ('{"choice": "A", "reason": ', None),
        ("choice: A", None),
        ("[1, 2]", None),
        ("", None),
        ('{"a":' * 100_000, None),
    ],
)
def test_parse_choice(reply: str, choice: str | None) -> None:
    assert parse_choice(reply) == choice


def test_nothing_is_asked_twice(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    first = judge(COMPARISONS[:6], Endpoint(server.url, "m"), cache)
    assert judge(COMPARISONS[:6], Endpoint(server.url, "m"), cache) == first and len(server.bodies) == 6
    judge(COMPARISONS[:7], Endpoint(server.url, "m"), cache)
    assert len(server.bodies) == 7
    judge(COMPARISONS[:7], Endpoint(server.url, "other"), cache)
    assert len(server.bodies) == 14
    judge(COMPARISONS[:7], Endpoint(server.url, "m", options={}), cache)
    assert len(server.bodies) == 21 and "temperature" not in server.bodies[-1]
    turned = sum(first_is_a(comparison, 0) != first_is_a(comparison, 3) for comparison in COMPARISONS[:7])
    judge(COMPARISONS[:7], Endpoint(server.url, "m"), cache, seed=3)
    assert len(server.bodies) == 21 + turned and turned > 0


def test_a_killed_run_continues(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    script = (
        "import sys; from pathlib import Path; from tests.test_judge import *; "
        "judge(COMPARISONS, Endpoint(sys.argv[1], 'm'), Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, server.url, str(cache)], cwd=Path(__file__).parents[1], env=dict(os.environ)
    )
    server.answer = killing(server, process, 6)
    assert process.wait(300) == -signal.SIGKILL
    assert len(cache.read_bytes().splitlines()) == 5
    with cache.open("r+b") as file:  # and the last line was being written
        file.truncate(cache.stat().st_size - 20)
    server.bodies.clear()
    server.answer = fair
    found = judge(COMPARISONS, Endpoint(server.url, "m"), cache)
    assert len(server.bodies) == 16 - 4 and found["wins"] == 12
    judge(COMPARISONS, Endpoint(server.url, "m"), cache)
    assert len(server.bodies) == 16 - 4


def test_passing_failures_are_waited_out(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.faults = ["hang", "drop", 500, 429, "cut", "<html>Bad gateway</html>", '{"choices": []}', "[]", 503]
    server.faults.append("[" * 100_000)
    faults = len(server.faults)
    endpoint = Endpoint(server.url, "m", timeout=3, attempts=12)
    found = judge(COMPARISONS[:2], endpoint, tmp_path / "cache.jsonl")
    assert found["wins"] == 2 and found["failed_attempts"] == faults == len(waits)
    assert len(server.bodies) == faults + 2
    assert all(0 <= wait <= min(60, 2**n) for n, wait in enumerate(waits, 1)) and len(set(waits)) == faults
    assert judge(COMPARISONS[:2], endpoint, tmp_path / "cache.jsonl")["failed_attempts"] == 0


def test_the_endpoint_says_how_long_to_wait(server: Server, tmp_path: Path, waits: list[float]) -> None:
    server.faults, server.retry_after = [429, 503, 429], "9"
    judge(COMPARISONS[:2], Endpoint(server.url, "m"), tmp_path / "cache.jsonl")
    assert waits == [9, 9, 9]


def test_an_endpoint_that_is_down_ends_in_one_line(server: Server, tmp_path: Path, waits: list[float]) -> None:
    cache, endpoint = tmp_path / "cache.jsonl", Endpoint(server.url, "m", attempts=3)
    judge(COMPARISONS[:2], endpoint, cache)
    server.faults = [500, 502, 500]
    with pytest.raises(InputError) as caught:
        judge(COMPARISONS[:5], endpoint, cache)
    message = (
        f"failed 3 times, at last with: HTTP 500 Internal Server Error; 2 of 5 verdicts are cached in {cache}, run"
    )
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(waits) == 2
    assert judge(COMPARISONS[:5], endpoint, cache)["comparisons"] == 5 and len(server.bodies) == 2 + 3 + 3


def test_nobody_listens(waits: list[float], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"http://127.0.0.1:{free.getsockname()[1]}/v1", "m", attempts=2)
        with pytest.raises(InputError, match=r"failed 2 times, at last with: .*refused; 0 of 1 verdicts"):
            judge(COMPARISONS[:1], endpoint, tmp_path / "cache.jsonl")


@pytest.mark.parametrize("code", [301, 307, 400, 401, 404])
def test_refusals_are_final_and_keep_the_key_secret(
    server: Server, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.faults = [code]
    with pytest.raises(InputError, match=f"refuses the request: HTTP {code}") as caught:
        judge(COMPARISONS[:2], Endpoint(server.url, "m"), tmp_path / "cache.jsonl")
    assert not waits and server.keys == [f"Bearer {SECRET}"]
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    assert ("HYPERLORA_JUDGE_KEY" if code == 401 else "(no Bearer [key])") in str(caught.value)


def test_the_key_comes_from_the_environment_and_is_not_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint(server.url, "m")
    judge(COMPARISONS[:1], endpoint, tmp_path / "none.jsonl")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("HYPERLORA_JUDGE_KEY", SECRET + "\n")
    result = judge(COMPARISONS[:1], endpoint, tmp_path / "cache.jsonl")
    assert server.keys == [None, f"Bearer {SECRET}"]
    assert (tmp_path / "none.jsonl").read_bytes() == (tmp_path / "cache.jsonl").read_bytes()
    assert SECRET not in (tmp_path / "cache.jsonl").read_text() + repr(endpoint) + repr(result)
    monkeypatch.setenv("HYPERLORA_JUDGE_KEY", SECRET + "\nX: y")
    with pytest.raises(InputError, match="characters that no key has") as caught:
        judge(COMPARISONS[:2], endpoint, tmp_path / "cache.jsonl")
    assert SECRET not in str(caught.value)


def test_addresses_are_checked(tmp_path: Path) -> None:
    for address in ("localhost:8000/v1", "file:///etc/hosts", "http://", "http://[1", "http://host:x/v1", "u:pw@host"):
        with pytest.raises(InputError, match="address cannot be used") as refused:
            Endpoint(address, "m")
        assert "pw" not in str(refused.value)
    for user in (f"user:{SECRET}", f":{SECRET}", SECRET, ""):
        with pytest.raises(InputError, match="HYPERLORA_JUDGE_KEY") as caught:
            Endpoint(f"https://{user}@host/v1", "m")
        assert SECRET not in str(caught.value)


def test_unusable_comparisons_and_caches_are_refused(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(server.url, "m")
    with pytest.raises(InputError, match="no comparisons"):
        judge([], endpoint, tmp_path / "cache.jsonl")
    with pytest.raises(InputError, match="ids must be unique"):
        judge(COMPARISONS[:1] * 2, endpoint, tmp_path / "cache.jsonl")
    with pytest.raises(InputError, match="cannot read"):
        judge(COMPARISONS[:1], endpoint, tmp_path)
    assert not server.bodies
