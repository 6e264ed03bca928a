import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from hyperlora import ranks
from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.evaluation import controls
from hyperlora.evaluation.answers import greedy
from hyperlora.evaluation.bootstrap import interval
from hyperlora.evaluation.controls import CONDITIONS, answer, score_controls
from hyperlora.evaluation.items import fact_items
from hyperlora.evaluation.metrics import contains, exact_match, f1
from hyperlora.evaluation.report import evaluate_answers, evaluate_forgetting, evaluate_second_copy, table
from hyperlora.evaluation.window import check_window
from hyperlora.generator import Generator
from hyperlora.inject import inject, patched

from .conftest import TEXT, make_generator


def test_squad_scores() -> None:
    assert exact_match("The  cat.", ["dog", "a cat"]) == 1.0
    assert exact_match("cat food", ["cat"]) == 0.0
    assert f1("the red cat", ["cat", "red cat sat"]) == pytest.approx(0.8)
    assert f1("", ["cat"]) == f1("a the", ["the"]) == 0.0 and exact_match("a the", ["the"]) == 1.0  # as in v1.1
    assert contains("It is 41 metres.", ["41 metres"]) == 1.0
    assert contains("It is 410 metres.", ["41"]) == 0.0


def test_interval_covers_the_mean_and_shrinks() -> None:
    few, many = interval([0.0, 1.0] * 10), interval([0.0, 1.0] * 1000)
    assert few[0] == many[0] == 0.5
    assert few[1] < many[1] < 0.5 < many[2] < few[2]


@pytest.mark.parametrize("batch_tokens", [1, 100, 10000])
def test_answers_use_the_right_patch(base: BaseModel, monkeypatch: pytest.MonkeyPatch, batch_tokens: int) -> None:
    """However many prompts run together."""
    monkeypatch.setattr("hyperlora.evaluation.controls._BATCH_TOKENS", batch_tokens)
    generator = make_generator(base)
    items = fact_items(2, 5)
    replies = answer(generator, items, tuple(CONDITIONS), max_new_tokens=6, documents=3)
    assert all(len(r) == 10 for r in replies.values())
    # Batches of three and two documents: the swapped patch of the fifth document is that of the fourth.
    patches = generator.generate([item.text for item in items])
    prompt = base.prompt.prompt_ids(base.tokenizer, items[4].questions[1].text)
    told = base.prompt.prompt_ids(base.tokenizer, items[4].questions[1].text, items[4].text)
    for name, asked, index in (("patch", prompt, 4), ("swapped", prompt, 3), ("beside", told, 3)):
        with patched(base.model, patches[index]):
            assert replies[name][-1] == greedy(base, [asked], 6)[0]
    for name, asked in (("none", prompt), ("full", told)):
        assert replies[name][-1] == greedy(base, [asked], 6)[0]


@pytest.mark.parametrize("questions", [2, 1])
def test_processes_share_out_the_questions(base: BaseModel, monkeypatch: pytest.MonkeyPatch, questions: int) -> None:
    """Each answers its part, and the scores are those of one process; every document is read by all."""
    generator = make_generator(base)
    items = [replace(item, questions=item.questions[:questions]) for item in fact_items(2, 5)]
    right = iter(answer(generator, items, ("patch",), max_new_tokens=24)["patch"])
    items = [
        replace(
            item,
            questions=tuple(replace(q, accepted=(next(right) + ("" if n % 3 else " no"),)) for q in item.questions),
        )
        for n, item in enumerate(items)
    ]
    alone = score_controls(generator, items, ("patch", "none"))
    assert 0 < alone["patch_exact_match"] < 1
    sums: list[list[float]] = []
    asked: list[int] = []
    monkeypatch.setattr(ranks, "count", lambda: 3)
    monkeypatch.setattr(ranks, "total", lambda values: sums.append(values) or values)
    greedily = controls.greedy
    monkeypatch.setattr(controls, "greedy", lambda b, p, n: asked.append(len(p)) or greedily(b, p, n))
    read: list[int] = []
    factors = generator.factors
    monkeypatch.setattr(generator, "factors", lambda documents: read.append(len(documents)) or factors(documents))
    for own in range(3):
        monkeypatch.setattr(ranks, "own", lambda own=own: own)
        score_controls(generator, items, ("patch", "none"))
    shared = [sum(parts) / (5 * questions) for parts in zip(*sums, strict=True)]
    assert shared == pytest.approx(list(alone.values()))
    assert sum(asked) == 2 * 5 * questions and read == [5, 5, 5]


def test_replies_are_greedy_whatever_the_base_brings(base: BaseModel) -> None:
    prompt = base.prompt.prompt_ids(base.tokenizer, "Who?")
    expected = greedy(base, [prompt], 12)
    brought = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    base.model.generation_config = brought
    assert greedy(base, [prompt], 12) == expected
    assert base.model.generation_config is brought


def test_a_base_that_never_ends_a_reply_is_stopped_at_the_limit(base: BaseModel) -> None:
    prompt = base.prompt.prompt_ids(base.tokenizer, "Who?")
    base.stop_ids, base.tokenizer.pad_token = [], None  # as without a token that ends or fills
    (reply,) = greedy(base, [prompt], 12)
    assert len(base.tokenizer(reply)["input_ids"]) > 5


def test_report_has_intervals_and_controls(generator: Generator, tmp_path: object) -> None:
    result = evaluate_answers(generator, "some facts", fact_items(2, 3), ["patch", "swapped"])
    assert result["documents"] == 3 and result["questions"] == 6 and result["generator"]["rank"] == 6
    assert set(result["scores"]) == {"patch", "swapped", "patch - swapped"}
    assert "| patch - swapped | " in table(result)
    result = evaluate_answers(generator, "some facts", fact_items(2, 3), ["beside", "full"])["scores"]
    assert set(result) == {"beside", "full", "beside - full"}
    assert result["beside - full"]["f1"][0] == pytest.approx(result["beside"]["f1"][0] - result["full"]["f1"][0])
    with pytest.raises(InputError, match="did you mean 'swapped'"):
        evaluate_answers(generator, "some facts", fact_items(2, 3), ["swaped"])


def test_document_beyond_the_window_is_refused_in_the_prompt_only(generator: Generator) -> None:
    short, *others = fact_items(1, 2)
    long = replace(short, text=TEXT * 60)
    with pytest.raises(InputError, match=rf"^some facts, document {long.id}: \d+ tokens .* window of 2048"):
        evaluate_answers(generator, "some facts", [long, *others], ["none", "full"])
    assert set(evaluate_answers(generator, "some facts", [long, *others], ["patch"])["scores"]) == {"patch"}


def test_documents_of_next_to_nothing_are_named(generator: Generator) -> None:
    """Before anything is done, whatever is asked of them: a comparison checks its documents like this."""
    items = fact_items(1, 2)
    for text, count in (("a", 1), ("", 0)):
        short = [items[0], replace(items[1], text=text)]
        message = rf"^task x, document {short[1].id}: {count} token\(s\), but a patch needs 2"
        with pytest.raises(InputError, match=message):
            check_window("task x", short, generator.base, 4)
        for condition in ("patch", "full"):
            with pytest.raises(InputError, match=message):
                evaluate_answers(generator, "task x", short, [condition])


def test_scores_stand_by_tag_too(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right where the length is 9, wrong elsewhere."""
    items = [replace(item, tags={"length": 9 if n < 3 else 10}) for n, item in enumerate(fact_items(1, 4))]
    given = [item.questions[0].reply if item.tags["length"] == 9 else "?" for item in items]
    monkeypatch.setattr("hyperlora.evaluation.report.answer", lambda *_, **__: {"patch": given})
    result = evaluate_answers(generator, "tagged", items, ["patch"])
    assert result["by"] == {"length": {"9": {"patch": (1, 1, 1)}, "10": {"patch": (0, 0, 0)}}}
    lines = table(result).splitlines()
    assert lines[-3:] == ["|---|---|", "| 9 | 1.000 [1.000, 1.000] |", "| 10 | 0.000 [0.000, 0.000] |"]


def test_forgetting_measures_the_rise_in_loss(base: BaseModel, tmp_path: object) -> None:
    path = f"{tmp_path}/text.txt"
    with open(path, "w") as file:
        file.write("".join(f" = {i} = \n{TEXT}\n" for i in range(3)))
    strong = make_generator(base)
    result = evaluate_forgetting(strong, path, 4, tokens=24)["scores"]
    rise = result["patch - bare"]["loss"][0]
    assert rise == pytest.approx(result["patch"]["loss"][0] - result["bare"]["loss"][0])
    told = evaluate_forgetting(strong, path, 4, in_prompt=True, tokens=24)
    assert told["task"].endswith(", in a prompt") and told["scores"]["bare"] != result["bare"]
    for value in [*strong.hypernet.copy, *strong.hypernet.point]:
        value.scale.data.zero_()
        value.learned.weight.data.zero_()
    strong.hypernet.adapter_b.data.zero_()
    nothing = evaluate_forgetting(strong, path, 4, tokens=24)["scores"]["patch - bare"]["loss"]
    assert nothing[0] == pytest.approx(0.0, abs=1e-6) and abs(rise) > 1e-3


def test_second_copy_scores_the_same_tokens_with_a_first_one_or_a_patch(base: BaseModel, tmp_path: Path) -> None:
    texts = ["Maro bakes bread every day.", "Lina paints boats by the sea and sells them.", "One", TEXT * 3]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    generator = make_generator(base)
    result = evaluate_second_copy(generator, str(path), 40)
    assert result["documents"] == 2 and result["task"].endswith("up to 40 tokens")
    ids = [generator.encoder.tokenize(text) for text in texts[:2]]
    sink = generator.encoder.sink

    def loss(before: list[int], own: list[int]) -> float:
        scored = torch.tensor([sink + before + own])
        logits = base.model(scored).logits[0, -len(own) : -1].detach()
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(own[1:])))

    slow = {
        "none": [loss([], own) for own in ids],
        "full": [loss(own, own) for own in ids],
        "patch": [],
        "swapped": [],
    }
    for own, other in zip(ids, reversed(ids), strict=True):
        for name, source in (("patch", own), ("swapped", other)):
            with torch.no_grad(), inject(base.model, generator.factors([source])):
                slow[name].append(loss([], own))
    for name, values in slow.items():
        assert result["scores"][name]["loss"][0] == pytest.approx(sum(values) / 2, abs=1e-4)
    share = result["share"]
    assert share["numerator"] == pytest.approx((sum(slow["none"]) - sum(slow["patch"])) / 2, abs=1e-4)
    assert share["denominator"] == pytest.approx((sum(slow["none"]) - sum(slow["full"])) / 2, abs=1e-4)
    assert "share of the drop" in table(result)
    with pytest.raises(InputError, match="two are needed"):
        evaluate_second_copy(generator, str(path), 12)
    path.write_text("\n".join(json.dumps({"text": TEXT * times}) for times in (1, 40)))
    with pytest.raises(InputError, match=r"the base's window is .*; lower --max-tokens"):
        evaluate_second_copy(generator, str(path), 100_000)
