from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from hyperlora.base_model import BaseModel
from hyperlora.errors import BaseMismatch, InputError
from hyperlora.evaluation.answers import greedy
from hyperlora.inject import patched
from hyperlora.memory import KV, Memory
from hyperlora.prompt import GAP, document_ids, encode
from hyperlora.runtime import Prompt, Runtime, _sampler
from hyperlora.session import Session
from hyperlora.shared_state import SharedState

from .conftest import make_base, make_generator
from .test_layout import shared_state

QUESTIONS = ("What is the parrot called?", "When does the ferry leave for Oskmere?", "Who?")


def stored(base: BaseModel, text: str) -> KV:
    """Keys and values of the prompt up to the end of the document."""
    (memory,) = Runtime(base).prefill([text_memory(base, text)])
    assert memory.kv is not None and not memory.text
    return memory.kv


def prefix(base: BaseModel) -> list[int]:
    return encode(base.tokenizer, base.prompt.prefix)


def text_memory(base: BaseModel, text: str) -> Memory:
    return Memory(text=tuple(document_ids(base.tokenizer, text)))


def kv_memory(base: BaseModel, text: str) -> Memory:
    return Memory(kv=stored(base, text))


def soft_memory(base: BaseModel, text: str) -> Memory:
    with torch.no_grad():
        return Memory(soft=base.model.get_input_embeddings()(torch.tensor(document_ids(base.tokenizer, text))))


@pytest.mark.parametrize("kind", [text_memory, kv_memory, soft_memory])
def test_a_document_in_any_form_answers_like_the_prompt(
    any_base: BaseModel, documents: list[str], kind: Callable[[BaseModel, str], Memory]
) -> None:
    """Text, its own keys and values, and its own embeddings are the same context: equal to transformers' generate and
    to an unbatched forward pass, ragged documents and questions, several questions of one document."""
    memories = [kind(any_base, text[:90]) for text in documents[:2]]
    asks = [(0, QUESTIONS[0]), (1, QUESTIONS[1]), (0, QUESTIONS[2])]
    tokenizer, prompt = any_base.tokenizer, any_base.prompt
    whole = [prompt.prompt_ids(tokenizer, question, documents[number][:90]) for number, question in asks]
    runtime = Runtime(any_base, batch_tokens=2000, chunk_tokens=16)
    replies = runtime.generate(memories, [runtime.question(*ask) for ask in asks], 8)
    assert replies == [greedy(any_base, [ids], 8)[0] for ids in whole]
    scored = runtime.log_likelihood(memories, [runtime.question(*ask, "eleven songs, on Tuesdays") for ask in asks])
    reply = prompt.answer_ids(tokenizer, "eleven songs, on Tuesdays")
    for ids, got in zip(whole, scored, strict=True):
        with torch.no_grad():
            logits = any_base.model(torch.tensor([ids + reply])).logits[0, len(ids) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_patches_answer_each_for_its_own_document(base: BaseModel, documents: list[str]) -> None:
    patches = make_generator(base, modules=["down_proj"]).generate(documents[:2])
    memories = [Memory(patch=patch) for patch in patches] + [Memory()]
    runtime = Runtime(base)
    asks = [(2, QUESTIONS[0]), (0, QUESTIONS[0]), (1, QUESTIONS[0]), (0, QUESTIONS[1])]
    replies = runtime.generate(memories, [runtime.question(*ask) for ask in asks], 8)
    for (number, question), reply in zip(asks, replies, strict=True):
        ids = [base.prompt.prompt_ids(base.tokenizer, question)]
        if number == 2:
            assert reply == greedy(base, ids, 8)[0]
            continue
        with patched(base.model, patches[number]):
            assert reply == greedy(base, ids, 8)[0]
    assert len(set(replies[:3])) == 3


def test_memories_that_are_read_before_answer_alike(any_base: BaseModel, documents: list[str]) -> None:
    """Nothing, a document, a patch and a patch with a document: questions, and text that follows at once."""
    base, runtime = any_base, Runtime(any_base, batch_tokens=150)
    patch = make_generator(base).generate(documents[0])
    ids = document_ids(base.tokenizer, documents[1][:60])
    memories = [Memory(), Memory(text=tuple(ids)), Memory(patch=patch), Memory(patch=patch).with_text(ids)]
    held = runtime.prefill(memories)
    assert all(memory.kv is not None and not memory.text for memory in held) and held[3].patch is patch
    numbers = range(len(memories))
    prompts = [runtime.question(number, QUESTIONS[0], "eleven songs") for number in numbers]
    prompts += [runtime.continuation(number, "The ferry leaves.") for number in numbers]
    scores = [runtime.log_likelihood(made, prompts) for made in (memories, held)]
    for one, other in zip(*scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert runtime.generate(memories, prompts[:4], 6) == runtime.generate(held, prompts[:4], 6)
    assert runtime.prefill(held) == held
    assert sorted(number for group in runtime.groups(memories) for number in group) == list(numbers)
    assert held[1].kv is not None
    silent = replace(held[1], kv=replace(held[1].kv, following=None))
    with pytest.raises(InputError, match="do not say what follows"):
        runtime.log_likelihood([silent], [runtime.continuation(0, "The ferry leaves.")])


def test_replies_that_have_ended_leave_the_batch(any_base: BaseModel, documents: list[str]) -> None:
    """Ragged prompts, with patches and documents: the others go on as they do alone."""
    base, runtime = any_base, Runtime(any_base)
    patches = make_generator(base).generate(documents[:2])
    ids = document_ids(base.tokenizer, documents[2][:40])
    memories = runtime.prefill([Memory(patch=patch).with_text(ids) for patch in patches] + [Memory()])
    prompts = [runtime.question(number % 3, QUESTIONS[number // 3]) for number in range(9)]
    whole = [runtime.generate_ids(memories, [prompt], 9, stop=False)[0] for prompt in prompts]
    # Two of them end at the second token, the others one after another.
    ends = {reply[1] for reply in whole[:2]} | {reply[4] for reply in whole[2:6]}
    cut = [next((reply[: n + 1] for n, token in enumerate(reply) if token in ends), reply) for reply in whole]
    held = []

    class Watched(Session):
        def feed(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            held.append(self.rows)
            return super().feed(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyperlora.prompt_reader.Session", Watched)
        assert runtime.generate_ids(memories, prompts, 9, stop=False, last=lambda token: token in ends) == cut
    longest = max(map(len, cut))
    assert held[0] == 9 and len(held) == longest
    going = [sum(len(reply) > step for reply in cut) for step in range(1, longest)]
    assert all(now < 2 * count for now, count in zip(held[1:], going, strict=True)) and held[-1] < 9


def test_samples_follow_the_probabilities_and_min_p_cuts_their_tail() -> None:
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05]).log().expand(4000, 4)
    for min_p, left in ((0.0, [0.5, 0.25, 0.2, 0.05]), (0.3, [0.5, 0.25, 0.2, 0.0]), (1.0, [1.0, 0.0, 0.0, 0.0])):
        drawn = _sampler(1.0, min_p, list(range(4000)))(logits, range(4000))
        share = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(share, torch.tensor(left) / sum(left), atol=0.03, rtol=0)
        assert not (share > 0)[torch.tensor(left) == 0].any()
    sharp = _sampler(0.5, 0.3, [0] * 4000)(logits, range(4000))
    assert len(sharp.unique()) == 1  # the seed decides
    drawn = _sampler(0.5, 0.3, list(range(4000)))(logits, range(4000))
    assert set(drawn.tolist()) == {0}  # of squared probabilities the second is a quarter of the first


def test_a_patch_and_a_document_work_together(base: BaseModel, documents: list[str]) -> None:
    patch = make_generator(base).generate(documents[0])
    memory = Memory(patch=patch).with_text(document_ids(base.tokenizer, documents[1]))
    with patched(base.model, patch):
        expected = greedy(base, [base.prompt.prompt_ids(base.tokenizer, QUESTIONS[0], documents[1])], 8)
    runtime = Runtime(base)
    assert runtime.generate([memory], [runtime.question(0, QUESTIONS[0])], 8) == expected


def test_a_patch_of_zeros_changes_nothing(any_base: BaseModel, documents: list[str]) -> None:
    """The control of the way that patches are put in: nothing of it acts by itself."""
    patch = make_generator(any_base).generate(documents[0])
    empty = replace(patch, factors={path: (a, torch.zeros_like(b)) for path, (a, b) in patch.factors.items()})
    runtime = Runtime(any_base)
    ask = [runtime.question(number, QUESTIONS[0], "eleven") for number in range(3)]
    bare, zero, own = runtime.log_likelihood([Memory(), Memory(patch=empty), Memory(patch=patch)], ask)
    assert torch.equal(zero, bare) and not torch.allclose(own, bare, atol=1e-2)
    alone = [runtime.log_likelihood([memory], ask[:1])[0] for memory in (Memory(patch=empty), Memory())]
    assert torch.equal(*alone)


def test_a_gated_adapter_is_silent_on_ordinary_tokens(base: BaseModel) -> None:
    shared = shared_state(base)
    runtime = Runtime(base)
    ask = [runtime.question(0, QUESTIONS[0], "eleven")]
    bare = runtime.log_likelihood([Memory()], ask)[0]
    torch.testing.assert_close(runtime.log_likelihood([Memory(shared=shared)], ask)[0], bare)
    open_state = SharedState("open", adapter=shared.adapter)
    assert not torch.allclose(runtime.log_likelihood([Memory(shared=open_state)], ask)[0], bare, atol=1e-2)
    with pytest.raises(InputError, match="share"):
        runtime.log_likelihood([Memory(), Memory(shared=shared)], [*ask, runtime.question(1, QUESTIONS[0], "x")])


def test_evicted_rows_keep_the_positions_of_the_others(any_base: BaseModel, documents: list[str]) -> None:
    """A KV memory without its middle answers like a forward pass that masks the middle."""
    base, runtime = any_base, Runtime(any_base)
    ids = prefix(base) + document_ids(base.tokenizer, documents[0][:60])
    held = torch.ones(1, len(ids), dtype=torch.bool)
    start = len(prefix(base)) + 2
    held[0, start : start + 7] = False
    line = torch.arange(len(ids))[None]
    with torch.no_grad(), Session(base, 1) as session:
        session.feed(torch.tensor([ids]), line, line, torch.zeros(line.shape, dtype=torch.bool))
        session.keep(held)
        kv = session.take(0)
    assert kv.next_position == kv.next_place == len(ids) and kv.positions.numel() == len(ids) - 7
    whole = stored(base, documents[0][:60])
    selected = whole.select(held[0])
    assert torch.equal(selected.positions, kv.positions) and torch.equal(selected.keys[1], kv.keys[1])
    slot = len(ids) - len(prefix(base))
    assert selected.elements == whole.elements * (slot - 7) // slot
    got = runtime.log_likelihood([Memory(kv=kv)], [runtime.question(0, QUESTIONS[0], "eleven songs")])[0]
    reply = base.prompt.answer_ids(base.tokenizer, "eleven songs")
    rest = encode(base.tokenizer, GAP) + base.prompt.question_ids(base.tokenizer, QUESTIONS[0]) + reply[:-1]
    total = len(ids) + len(rest)
    seen = torch.ones(1, total, total, dtype=torch.bool).tril()
    seen[0, len(ids) :, start : start + 7] = False
    wanted = torch.zeros(1, total, dtype=torch.bool)
    wanted[0, -len(reply) :] = True
    line = torch.arange(total)[None]
    with torch.no_grad(), Session(base, 1) as session:
        logits = session.feed(torch.tensor([ids + rest]), line, line, wanted, visible=seen)
    expected = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_bytes_are_counted_at_one_precision(base: BaseModel, documents: list[str]) -> None:
    config = base.model.config
    per_token = 2 * 4 * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * 2
    text = text_memory(base, documents[0])
    tokens = len(text.text)
    assert text.resident_bytes(base) == tokens * per_token
    assert text.stored_bytes(base) == len(documents[0].encode())
    soft = soft_memory(base, documents[0])
    assert soft.resident_bytes(base) == tokens * per_token and soft.stored_bytes(base) == tokens * 32 * 2
    kv = kv_memory(base, documents[0])
    assert kv.resident_bytes(base) == tokens * per_token  # the prefix is not the document's
    generator = make_generator(base)
    patch = Memory(patch=generator.generate(documents[0]))
    numbers = 2 * 6 * (32 + 32) + sum(2 * (module.d_in + module.d_out) for module in generator.hypernet.fixed)
    assert patch.resident_bytes(base) == patch.stored_bytes(base) == 2 * numbers


def test_bad_memories_are_refused(documents: list[str]) -> None:
    base, other = make_base(), make_base(seed=5)
    runtime = Runtime(other)
    foreign = Memory(patch=make_generator(base).generate(documents[0]))
    with pytest.raises(BaseMismatch):
        runtime.generate([foreign], [runtime.question(0, "Who?")], 4)
    endless = Memory(text=(5,) * 3000)
    with pytest.raises(InputError, match="window of 2048"):
        runtime.generate([endless], [runtime.question(0, "Who?")], 4)
    with pytest.raises(InputError, match="cannot share"):
        runtime.generate([kv_memory(other, "A ferry."), Memory()], [runtime.question(0, "?"), runtime.question(1, "?")])
    assert runtime.log_likelihood([Memory()], [Prompt(0, [7, 8], [9])])[0].shape == (1,)


def test_text_with_nothing_before_it_is_refused() -> None:
    """A base without a chat format or a token to start with: the first token would have no prediction."""
    base = make_base(chat=False)
    base.prompt = replace(base.prompt, prefix="")
    runtime = Runtime(base)
    with pytest.raises(InputError, match="nothing stands before the text"):
        runtime.log_likelihood([Memory()], [runtime.continuation(0, "The ferry leaves.")])
    assert (
        len(runtime.log_likelihood([text_memory(base, "Salt.")], [runtime.continuation(0, "The ferry leaves.")])) == 1
    )


def test_attention_without_masks_is_left_aside_for_the_block_only(base: BaseModel, documents: list[str]) -> None:
    """As flash-attention is, here by another name that knows no masks."""
    runtime = Runtime(base)
    ask = [runtime.question(0, QUESTIONS[0], "eleven songs")]
    expected = runtime.log_likelihood([text_memory(base, documents[0])], ask)[0]

    def unmasked(*_: object, **__: object) -> None:
        raise AssertionError

    AttentionInterface.register("unmasked", unmasked)
    base.model.set_attn_implementation("unmasked")
    torch.testing.assert_close(runtime.log_likelihood([text_memory(base, documents[0])], ask)[0], expected)
    assert base.attention == "unmasked"
