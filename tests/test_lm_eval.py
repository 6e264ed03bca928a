"""The model of lm-evaluation-harness: the harness's own loop on local tasks, and requests against the bare model."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from hyperlora.base_model import BaseModel, load_base
from hyperlora.errors import BaseMismatch, InputError
from hyperlora.evaluation import lm_eval_model
from hyperlora.evaluation.answers import greedy
from hyperlora.evaluation.lm_eval_model import HyperloraLM
from hyperlora.methods import METHODS, Document
from hyperlora.prompt import encode
from hyperlora.runtime import Runtime

from .conftest import make_base, make_generator

QUESTION = "What is the parrot called?"
CHOICES = ["Admiral", "the ferry to Oskmere"]
Make = Callable[..., HyperloraLM]

TASKS = {
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_target": 0,
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    },
}


@pytest.fixture
def make(tiny_dirs: tuple[str, str]) -> Make:
    return lambda method="generator", **options: HyperloraLM(
        **{"base": tiny_dirs[0], "generator": tiny_dirs[1], "method": method, **options}
    )


def request(kind: str, document: str, *arguments: Any, **row: Any) -> Instance:
    return Instance(kind, {"context": document, **row}, arguments, 0, ("tiny", 0, 1))


def choices(documents: Sequence[str], answers: Sequence[str] = CHOICES) -> list[Instance]:
    return [
        request("loglikelihood", document, f"{document}\n\n{QUESTION}", f" {answer}")
        for document in documents
        for answer in answers
    ]


def direct(base: BaseModel, prompt: list[int], reply: list[int]) -> tuple[float, bool]:
    """The reply's log-probability and greediness by a plain forward pass."""
    with torch.no_grad():
        logits = base.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].float()
    likely = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])
    return float(likely.sum()), logits.argmax(-1).tolist() == reply


def evaluate(tmp_path: Path, rows: list[dict[str, Any]], tiny_dirs: tuple[str, str], **options: Any) -> dict[str, Any]:
    """The harness's results on both tasks, over `rows`."""
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "rows.json")},
                "cache_dir": str(tmp_path / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{context}}\n\n{{question}}",
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(common | task))
    results = lm_eval.simple_evaluate(
        model="hyperlora",
        model_args={"base": tiny_dirs[0], "generator": tiny_dirs[1], **options},
        device="cpu",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=1,
        bootstrap_iters=0,
    )
    assert results is not None
    return dict(results)


@pytest.mark.parametrize("name", ["generator", "full", "none"])
def test_the_harness_runs_its_tasks_on_memories(
    tmp_path: Path, documents: list[str], tiny_dirs: tuple[str, str], name: str
) -> None:
    """Replies and likelihoods are the runtime's, and the metrics follow from them."""
    base = load_base(tiny_dirs[0], device="cpu")
    held = [Document(str(number), text) for number, text in enumerate(documents[:3])]

    def memories(name: str) -> list[Any]:
        kind = METHODS[name]
        return kind(base, kind.Settings(**({"path": tiny_dirs[1]} if name == "generator" else {}))).compile(held)

    runtime, ask = Runtime(base), range(len(held))
    replies = {
        method: runtime.generate(memories(method), [runtime.question(i, QUESTION) for i in ask], 6)
        for method in {name, "full"}
    }
    # The answer is what the model says with the document in its prompt, so that `full` alone has everything right.
    rows = [
        {"context": document.text, "question": QUESTION, "choices": CHOICES, "answer": reply}
        for document, reply in zip(held, replies["full"], strict=True)
    ]
    results = evaluate(tmp_path, rows, tiny_dirs, method=name)
    assert [sample["resps"] for sample in results["samples"]["written"]] == [[[reply]] for reply in replies[name]]
    right = sum(a == b for a, b in zip(replies[name], replies["full"], strict=True)) / len(held)
    assert results["results"]["written"]["exact_match,none"] == pytest.approx(right)
    assert (right == 1) is (name == "full")
    prompts = [runtime.question(i, QUESTION, answer) for i in ask for answer in CHOICES]
    likely = [float(score[:-1].sum()) for score in runtime.log_likelihood(memories(name), prompts)]
    got = [response[0][0] for sample in results["samples"]["chosen"] for response in sample["resps"]]
    assert got == pytest.approx(likely, abs=1e-4)
    first = sum(a > b for a, b in zip(likely[::2], likely[1::2], strict=True)) / len(held)
    assert results["results"]["chosen"]["acc,none"] == pytest.approx(first)
    assert results["config"]["method"] == name and results["config"]["base"] == tiny_dirs[0]


@pytest.mark.parametrize("chat", [True, False])
def test_likelihoods_equal_a_forward_pass_with_the_document_in_the_prompt(
    tmp_path: Path, documents: list[str], chat: bool
) -> None:
    base = make_base(chat=chat)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    lm = HyperloraLM(base=str(tmp_path), method="full", device="cpu")
    prompt = base.prompt.prompt_ids(base.tokenizer, QUESTION, documents[0])
    likeliest = greedy(base, [prompt], 5)[0]
    for answer in ("Admiral", likeliest, likeliest + " zz"):
        reply = base.prompt.answer_ids(base.tokenizer, answer)[:-1]
        expected = direct(base, prompt, reply)
        for written in (f" {answer}", answer):  # the delimiter of the harness makes no difference
            asked = request("loglikelihood", documents[0], f"{documents[0]}\n\n{QUESTION}", written)
            ((score, is_greedy),) = lm.loglikelihood([asked])
            assert score == pytest.approx(expected[0], abs=1e-4) and is_greedy is expected[1]


def test_greedy_replies_are_known_as_such(make: Make, base: BaseModel, documents: list[str]) -> None:
    """The likeliest token is greedy, alone; with another one before or after it, it is not."""
    for document in documents:
        prompt = base.prompt.prompt_ids(base.tokenizer, QUESTION, document)
        with torch.no_grad():
            token = int(base.model(torch.tensor([prompt])).logits[0, -1].argmax())
        text = base.tokenizer.decode([token])
        if text == text.strip() and base.prompt.answer_ids(base.tokenizer, text)[:-1] == [token]:
            break
    else:
        raise AssertionError("no document's likeliest token is one that the tokenizer would write")
    found = make("full").loglikelihood(choices([document], [text, f"{text}!", f"!{text}"]))
    assert [is_greedy for _, is_greedy in found] == [True, False, False]


def test_examples_stay_and_the_own_document_goes(make: Make, base: BaseModel, documents: list[str]) -> None:
    lm, runtime = make(), Runtime(base)
    patch = lm.method.compile([Document("a", documents[0])])
    for example in (documents[1], documents[0]):  # the example may be about the same document
        shown = f"{example}\n\nWho?\nMaro\n\n"
        ((score, _),) = lm.loglikelihood(
            [request("loglikelihood", documents[0], f"{shown}{documents[0]}\n\n{QUESTION}", " Admiral")]
        )
        left = runtime.question(0, f"{shown}\n\n{QUESTION}", "Admiral")
        assert score == pytest.approx(float(runtime.log_likelihood(patch, [left])[0][:-1].sum()), abs=1e-4)


def test_a_rolling_text_is_what_follows_the_document(make: Make, base: BaseModel, documents: list[str]) -> None:
    (score,) = make("full").loglikelihood_rolling([request("loglikelihood_rolling", documents[0], documents[1])])
    before = encode(base.tokenizer, base.prompt.prefix) + base.tokenizer(documents[0])["input_ids"]
    assert score == pytest.approx(direct(base, before, base.tokenizer(documents[1])["input_ids"])[0], abs=1e-3)
    with pytest.raises(InputError, match="'context'"):
        make("full").loglikelihood_rolling([request("loglikelihood_rolling", documents[0], "".join(documents[:2]))])


def test_replies_end_where_they_are_told_to(make: Make, documents: list[str]) -> None:
    lm, prompt = make("full"), f"{documents[0]}\n\n{QUESTION}"

    def reply(**arguments: Any) -> str:
        return lm.generate_until([request("generate_until", documents[0], prompt, arguments)])[0]

    whole = reply(max_gen_toks=8)
    assert len(whole) > 4 and reply(max_gen_toks=8, until=None, do_sample=False, temperature=0.7) == whole
    stop = whole[3:5]
    assert reply(max_gen_toks=8, until=stop) == reply(max_new_tokens=8, until=["\x00", stop]) == whole.split(stop)[0]
    short, long = lm.generate_until(
        [request("generate_until", documents[0], prompt, {"max_gen_toks": most}) for most in (2, 8)]
    )
    assert long == whole and short == reply(max_gen_toks=2) != whole


@pytest.mark.parametrize("name", ["generator", "full", "truncation"])
def test_batches_and_order_change_nothing(
    make: Make, documents: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = choices(documents)
    written = [
        request("generate_until", text, f"{text}\n\n{QUESTION}", {"max_gen_toks": 3 + number})
        for number, text in enumerate(documents)
    ]
    lm = make(name)
    together, replies = lm.loglikelihood(asked), lm.generate_until(written)
    assert len({score for score, _ in together}) == len(asked)
    monkeypatch.setattr(lm_eval_model, "UNIT", 3)
    monkeypatch.setattr(lm_eval_model, "KEPT", 2)
    alone = make(name, batch_tokens=1)
    again = alone.loglikelihood([*asked[1::2], *asked[::2]])  # the requests of a document no longer come together
    together = [*together[1::2], *together[::2]]
    assert [score for score, _ in again] == pytest.approx([score for score, _ in together], abs=1e-4)
    assert [is_greedy for _, is_greedy in again] == [is_greedy for _, is_greedy in together]
    assert alone.generate_until(written[::-1])[::-1] == replies


def test_a_document_is_compiled_once_and_few_are_kept(
    make: Make, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_model, "KEPT", 2)
    lm, compiled = make("full"), []
    own = lm.method.compile
    monkeypatch.setattr(lm.method, "compile", lambda new, budgets: compiled.extend(new) or own(new, budgets))
    lm.loglikelihood([*choices(documents[:3]), *choices(documents[:3])])
    assert [document.text for document in compiled] == documents[:3] and list(lm._kept) == documents[1:3]
    lm.loglikelihood(choices(documents[1:2]))  # kept from the call before, and now the most recently used
    lm.loglikelihood(choices(documents[3:4]))
    assert [document.text for document in compiled] == documents and list(lm._kept) == [documents[1], documents[3]]


def test_mistakes_are_told_in_one_line(make: Make, documents: list[str], tmp_path: Path) -> None:
    lm, text = make("none"), documents[0]
    prompt = f"{text}\n\n{QUESTION}"

    def told(message: str, call: Callable[[], object], kind: type[Exception] = InputError) -> None:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    def generated(**arguments: Any) -> Callable[[], object]:
        return lambda: lm.generate_until([request("generate_until", text, prompt, arguments)])

    told("tiny has no field 'passage'.*'passages'", lambda: make("none", context_field="passage").loglikelihood(
        [request("loglikelihood", text, prompt, " a", passages=text)]
    ))  # fmt: skip
    told("'context'", lambda: lm.loglikelihood([request("loglikelihood", text, QUESTION, " a")]))
    told("is not a text", lambda: lm.loglikelihood([request("loglikelihood", " ", prompt, " a")]))
    told("continuation is empty", lambda: lm.loglikelihood(choices([text], [""])))
    told("greedy", generated(do_sample=True))
    told("greedy", generated(temperature=0.7))
    told("'num_beams'", generated(num_beams=4))
    told("apply_chat_template", lambda: lm.chat_template(True))
    told("apply_chat_template", lambda: lm.tokenizer_name)
    told("unknown method 'generater'; did you mean 'generator'", lambda: make("generater"))
    told("unknown model argument 'contextfield'", lambda: make(contextfield="x"))
    make_generator(make_base("qwen3")).save_pretrained(tmp_path / "other")
    told("base", lambda: make(generator=str(tmp_path / "other")), BaseMismatch)


def test_the_command_line_is_the_harness_s_own(
    documents: list[str],
    tiny_dirs: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = [{"context": documents[0], "question": QUESTION, "choices": CHOICES, "answer": "x"}]
    evaluate(tmp_path, rows, tiny_dirs, method="none")  # writes the tasks
    # Reading the thousands of tasks that the harness ships takes longer than all the rest.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    model = f"base={tiny_dirs[0]},generator={tiny_dirs[1]}"
    command = ["lm-eval", "--model", "hyperlora", "--tasks", str(tmp_path / "chosen.yaml"), "--model_args"]
    monkeypatch.setattr(sys, "argv", [*command, model])
    lm_eval_model.main()
    assert "|chosen|" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, f"{model},context_field=passage"])
    with pytest.raises(SystemExit) as end:
        lm_eval_model.main()
    assert end.value.code == 3
    assert "hyperlora: error: a row of the task chosen has no field 'passage'" in capfd.readouterr().err
