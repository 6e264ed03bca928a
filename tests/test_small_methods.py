"""Methods that insert tokens or restrict sight go through the one runtime and through a comparison's units."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperlora import prompt_reader
from hyperlora.base_model import BaseModel
from hyperlora.compare.cache import Cache
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.units import Unit, run_unit
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.layout import run_masked
from hyperlora.memory import Memory
from hyperlora.methods import Document
from hyperlora.prompt import GAP, encode
from hyperlora.prompt_reader import Prompt, open_reader
from hyperlora.runtime import Runtime
from hyperlora.session import Session
from hyperlora.tasks import read_task

from .small_methods import SMALL, SmallMethod

REPLY = "eleven songs, on Tuesdays"


@pytest.fixture(params=sorted(SMALL))
def method(request: pytest.FixtureRequest, any_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> SmallMethod:
    monkeypatch.setattr(prompt_reader, "_LEAST", 3)
    return SMALL[request.param](any_base)


def before(method: SmallMethod, document: str, prompt: Prompt) -> tuple[list[int], range]:
    """All ids before the reply, as the method's layout takes them, and which of them are the context."""
    base = method.base
    prefix = encode(base.tokenizer, base.prompt.prefix)
    (memory,) = method.compile([Document("a", document)])
    text = list(memory.text or method.texts([Document("a", document)])[0])
    gap = encode(base.tokenizer, GAP) if prompt.gap else []
    return [*prefix, *text, *gap, *prompt.ids], range(len(prefix), len(prefix) + len(text))


@torch.no_grad()
def expected(method: SmallMethod, ids: list[int], slot: range, reply: list[int]) -> torch.Tensor:
    """Logits of the reply by one masked pass over everything."""
    with Session(method.base, 1, shared=method.shared) as session:
        return run_masked(session, [method.expected(ids + reply, slot)])[0][-len(reply) :]


def test_scores_equal_the_masked_layout(method: SmallMethod, documents: list[str]) -> None:
    """Ragged documents, a question and a text that follows at once."""
    runtime, texts = Runtime(method.base), [documents[0][:90], documents[1][:60]]
    memories = method.compile([Document(str(n), text) for n, text in enumerate(texts)])
    for prompts in (
        [runtime.question(n, "What is the parrot called?", REPLY) for n in (0, 1, 0)],
        [runtime.continuation(n, REPLY) for n in (0, 1)],
    ):
        for held in (memories, runtime.prefill(memories)):
            scored = runtime.log_likelihood(held, prompts)
            for prompt, got in zip(prompts, scored, strict=True):
                logits = expected(method, *before(method, texts[prompt.memory], prompt), prompt.reply)
                wanted = logits.log_softmax(-1).gather(1, torch.tensor(prompt.reply)[:, None]).squeeze(1)
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_replies_equal_those_of_the_masked_layout(method: SmallMethod, documents: list[str]) -> None:
    """Tokens are inserted and rows are freed while decoding, and nothing changes."""
    runtime, texts = Runtime(method.base), [documents[0][:90], documents[1][:60]]
    memories = method.compile([Document(str(n), text) for n, text in enumerate(texts)])
    prompts = [runtime.question(0, "What is the parrot called?"), runtime.question(1, "Who?")]
    replies = runtime.generate_ids(memories, prompts, 12, stop=False)
    for text, prompt, reply in zip(texts, prompts, replies, strict=True):
        ids, slot = before(method, text, prompt)
        logits = expected(method, ids, slot, reply)
        assert logits.argmax(-1).tolist() == reply and len(reply) == 12


@pytest.mark.parametrize("name", ["window", "compressing", "dropped_span"])
@torch.no_grad()
def test_what_no_later_token_sees_is_freed(
    base: BaseModel, documents: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(prompt_reader, "_LEAST", 3)
    method, reply = SMALL[name](base), list(range(5, 25))
    prompt = Runtime(base).question(0, "Who?")
    ids, slot = before(method, documents[0], prompt)
    with open_reader(base, method.compile([Document("a", documents[0])]), [prompt], 1024) as reader:
        reader.begin()
        rows = [reader.session.kv_rows]
        for token in reply:
            reader.go_on([token])
        rows.append(reader.session.kv_rows)
    for held, read in zip(rows, [ids, ids + reply], strict=True):
        kept = int(method.expected([*read, 0], slot).kept.sum()) - 1
        assert kept <= held <= kept + 3 < len(read)


def test_a_comparison_runs_them_on_questions_and_on_text(
    method: SmallMethod, documents: list[str], tmp_path: Path
) -> None:
    base = method.base
    experiment = Experiment.model_validate(
        {"name": "small", "tasks": {"qa": {"task": "qa"}}, "methods": {"m": {"method": "full"}}, "unrelated": None}
    )
    items = tuple(
        Item(str(n), text[:60], (Question("Who?", "Admiral", ("Admiral",)),), following=text[60:90])
        for n, text in enumerate(documents[:3])
    )
    for name, spec in (
        ("answers", {"task": "qa", "source": "squad_dev", "max_new_tokens": 4}),
        ("text", {"task": "language_modelling", "source": "wikitext2_test"}),
    ):
        task = read_task(spec, name)
        unit = Unit(name, "m", 0, items, 0)
        records = run_unit(
            unit, range(3), task, experiment, method, lambda _: None, Runtime(base), Cache(tmp_path, name)
        )
        for record in records:
            for condition in ("own", "swapped"):
                losses = record[condition]["nll"]
                assert losses and all(math.isfinite(loss) for loss in losses)
            assert record["own"]["nll"] != record["swapped"]["nll"]
            assert record["resident_bytes"] > 0


def test_a_rule_goes_with_text_only(base: BaseModel, documents: list[str]) -> None:
    (ruled,) = SMALL["window"](base).compile([Document("a", documents[0])])
    (stored,) = Runtime(base).prefill([Memory(text=ruled.text)])
    with pytest.raises(InputError, match="lays out text"):
        Runtime(base).generate([replace(stored, shared=ruled.shared)], [Runtime(base).question(0, "Who?")])
