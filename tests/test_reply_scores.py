"""Further scores of replies in a comparison: what is checked before the run, and what they say."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from hyperlora.base_model import BaseModel, BaseNotFound
from hyperlora.compare.cache import Cache
from hyperlora.compare.experiment import read_experiment
from hyperlora.compare.reply_scores import add_reply_scores, check_reply_scores
from hyperlora.compare.units import Unit
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.evaluation.bert_score import BertScore
from hyperlora.evaluation.metrics import rouge_l

from .conftest import TEXT, make_base

ITEMS = (
    Item("doc-0", "Maro sells rye bread.", (Question("What?", "rye", ("rye bread", "rye")),)),
    Item("doc-1", TEXT, (Question("Who?", "Maro", ("Maro",)), Question("When?", "late", ("late",)))),
)
REPLIES = ([["bread of rye"], ["Maro the baker", "never"]], [["rye"], ["x", ""]])  # own and swapped


def finished(folder: Path) -> tuple[list[tuple[Unit, list[str]]], Cache]:
    """One unit of two documents, with its records."""
    folder.mkdir()
    cache, keys = Cache(folder), ["key-0", "key-1"]
    cache.add(
        {
            key: {"own": {"replies": REPLIES[0][number]}, "swapped": {"replies": REPLIES[1][number]}}
            for number, key in enumerate(keys)
        }
    )
    return [(Unit("notes", "patch", 0, ITEMS, 0), keys)], cache


def read(experiment: Path, line: str) -> Any:
    experiment.write_text(f"{experiment.read_text()}\n{line}\n")
    return read_experiment(experiment)


def test_a_reader_that_is_not_there_is_found_out_before_the_run(
    experiment: Path, tiny_dirs: tuple[str, str], tmp_path: Path
) -> None:
    shutil.copytree(tiny_dirs[0], tmp_path / "reader")
    check_reply_scores(read(experiment, f"readers: {{same: null, other: {tmp_path / 'reader'}}}"))
    (tmp_path / "reader" / "config.json").write_text("{}")
    with pytest.raises(BaseNotFound, match="check that its files are whole"):
        check_reply_scores(read_experiment(experiment))
    experiment.write_text(experiment.read_text().replace(str(tmp_path / "reader"), "gema3-270m"))
    with pytest.raises(
        BaseNotFound, match=r"cannot load base model 'gema3-270m': .*did you mean 'gemma3-270m'"
    ) as caught:
        check_reply_scores(read_experiment(experiment))
    assert "\n" not in str(caught.value)


def test_a_document_beyond_a_readers_window_is_named(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with it just fitting, reply and all."""
    reader = make_base("gpt2")
    monkeypatch.setattr("hyperlora.compare.reply_scores.load_base", lambda *_, **__: reader)
    asked = read(experiment, "readers: {small: some/reader}")
    prompt = reader.prompt.prompt_ids(reader.tokenizer, "Who?", TEXT)
    longest = len(prompt) + len(reader.prompt.answer_ids(reader.tokenizer, "Maro the baker")) - 1  # its end is not read
    for limit in (longest, longest - 1):
        reader.model.config.n_positions = limit
        unit, cache = finished(tmp_path / str(limit))
        if limit == longest:
            ((_, records),) = add_reply_scores(asked, base, unit, cache)
            assert len(records[1]["own"]["reply_nll_small"]) == 2
        else:
            message = f"^reader tiny-gpt2, document doc-1 of task notes: {longest} tokens .* window of {limit}"
            with pytest.raises(InputError, match=message):
                add_reply_scores(asked, base, unit, cache)


def test_rouge_l_of_the_replies(experiment: Path, base: BaseModel, tmp_path: Path) -> None:
    ((_, records),) = add_reply_scores(read(experiment, "metrics: [rouge_l]"), base, *finished(tmp_path / "out"))
    for condition, replies in zip(("own", "swapped"), REPLIES, strict=True):
        for record, item, said in zip(records, ITEMS, replies, strict=True):
            pairs = zip(said, item.questions, strict=True)
            assert record[condition]["rouge_l"] == [rouge_l(reply, question.accepted) for reply, question in pairs]
    assert records[0]["own"]["rouge_l"] == [pytest.approx(0.5)] and records[0]["swapped"]["rouge_l"] == [1.0]


def test_another_encoder_scores_again(
    experiment: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, (units, cache), loaded = read(experiment, "metrics: [bert_score]"), finished(tmp_path / "out"), []
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.parent.mkdir()
    made = "hyperlora.compare.reply_scores"
    monkeypatch.setattr(f"{made}.installed_encoder", lambda: str(weights.parent))
    monkeypatch.setattr(f"{made}.load_encoder", lambda: loaded.append(weights.read_text()))
    monkeypatch.setattr(f"{made}.bert_score", lambda replies, *_: [BertScore(0.5, 0.5, len(loaded))] * len(replies))
    for content, scored in (("one", 1), ("one", 1), ("other", 2), ("one", 1)):
        weights.write_text(content)
        ((_, records),) = add_reply_scores(asked, base, units, cache)
        assert records[0]["own"]["bert_score"] == [scored]
    assert loaded == ["one", "other"]


@pytest.mark.parametrize("line", ["metrics: [bert_score]", "readers: {same: null}"])
def test_scores_of_replies_are_refused_where_there_are_none(experiment: Path, tmp_path: Path, line: str) -> None:
    read(experiment, line)
    text, old = experiment.read_text(), f"notes: {{task: jsonl, path: {tmp_path / 'data.jsonl'}, max_new_tokens: 4}}"
    assert old in text
    books = "books: {task: language_modelling, source: books}"
    experiment.write_text(text.replace(old, f"{old}\n  {books}"))
    read_experiment(experiment)
    experiment.write_text(text.replace(old, books))
    with pytest.raises(InputError, match=f"{line.partition(':')[0]}: no task has replies to score; remove") as caught:
        read_experiment(experiment)
    assert "\n" not in str(caught.value)
