"""Methods that insert tokens or restrict sight go through the one runtime and through a comparison's units."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hyperlora import prompt_reader
from hyperlora.base_model import BaseModel
from hyperlora.compare.cache import Cache
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.units import Unit, run_unit
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.inject import TokenGate, inject
from hyperlora.layout import Tokens, run_masked
from hyperlora.memory import Memory
from hyperlora.methods import Document
from hyperlora.prompt import GAP, encode
from hyperlora.prompt_reader import Prompt, open_reader
from hyperlora.runtime import Runtime
from hyperlora.session import Session
from hyperlora.tasks import read_task

from .small_methods import SMALL, Merged, SmallMethod, thirds

REPLY = "eleven songs, on Tuesdays"


@pytest.fixture(params=sorted(set(SMALL) - {"merged"}))  # a mean is no layout
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
    layout = method.expected(Tokens(ids + reply, slot, len(ids)))
    with Session(method.base, 1, shared=method.shared) as session:
        return run_masked(session, [layout])[0][-len(reply) :]


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


@pytest.mark.parametrize("name", ["window", "compressing", "dropped_span", "placing"])
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
        kept = int(method.expected(Tokens([*read, 0], slot, len(ids))).kept.sum()) - 1
        assert kept <= held <= kept + 3
        if name != "placing":
            assert kept + 3 < len(read)
        elif read != ids:  # it keeps the prompt, and frees at every token
            assert held == kept < len(read)


@pytest.mark.parametrize("method", sorted(SMALL), indirect=True)
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


def test_merged_memory_is_the_mean_of_the_models_own_keys_and_values(base: BaseModel, documents: list[str]) -> None:
    """Chunk by chunk through the library's own cache; and what trains a merged memory is its gradient."""
    method = Merged(base)
    (text,) = method.texts([Document("a", documents[0])])
    adapter, rows = method.shared.adapter, method.shared.token_rows
    assert adapter is not None and rows is not None
    name = Session(base, 1)._cache_name
    prefix, table, gate = encode(base.tokenizer, base.prompt.prefix), base.model.get_input_embeddings(), TokenGate()

    def read(ids: list[int], held: list[list[Tensor]], start: int, comps: int) -> list[list[Tensor]]:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(held):
            cache.update(keys, values, layer)
        line = torch.cat([table(torch.tensor(ids)), rows[:comps]])[None]
        gate.value = torch.tensor([[0.0] * len(ids) + [1.0] * comps])
        positions = torch.arange(start, start + line.shape[1])[None]
        with inject(base.model, adapter, gate=gate):
            base.model(inputs_embeds=line, position_ids=positions, **{name: cache})
        return [[layer.keys, layer.values] for layer in cache.layers]

    with torch.no_grad():
        alone = read(prefix, [], 0, 0)
        memory, start, seen = alone, len(prefix), []
        for chunk in thirds(list(text), range(len(text))):
            seen.append([[t[:, :, -2:] for t in pair] for pair in read(chunk, memory, start, 2)])
            start += len(chunk)
            memory = [
                [torch.cat([alone[i][j], torch.stack([one[i][j] for one in seen]).mean(0)], dim=2) for j in (0, 1)]
                for i in range(len(alone))
            ]
        made = method.merged(list(text))
    assert (made.next_position, made.elements) == (len(prefix) + len(text), 2 * base.kv_bytes_per_token // 2)
    for layer, (keys, values) in enumerate(memory):
        torch.testing.assert_close(made.keys[layer][None], keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.values[layer][None], values, rtol=1e-4, atol=1e-5)

    direction = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))

    def loss(step: float | Tensor) -> Tensor:
        moved = Merged(base)
        moved.shared = replace(moved.shared, token_rows=rows + step * direction)
        with Session(base, 1, shared=moved.shared) as session:
            session.load([moved.merged(list(text))])
            here = torch.tensor([[7, 8, 9]])
            numbers = torch.arange(3)[None]
            logits = session.feed(
                here, session.next_place + numbers, session.next_position + numbers, numbers >= 0, gate=0.0 * here
            )
            return torch.nn.functional.cross_entropy(logits[:-1], here[0, 1:])

    step = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(loss(step), step)
    with torch.no_grad():
        rise = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert abs(float(slope)) > 1e-4
    torch.testing.assert_close(slope, rise, rtol=2e-2, atol=1e-5)
