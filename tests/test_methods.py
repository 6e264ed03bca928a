"""One matrix over all methods, and what each one owes besides."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.inject import stack_patches
from hyperlora.memory import Memory
from hyperlora.methods import METHODS, Document, Method, distillation
from hyperlora.methods.adapted import fresh_adapter
from hyperlora.methods.regression import fit
from hyperlora.methods.self_study import COPIES, EXAMPLES, SEEDS, chat, study
from hyperlora.methods.summary import ranking, sentences
from hyperlora.methods.teaching import differences, teach
from hyperlora.objectives import top_k_kl
from hyperlora.prompt import document_ids, encode
from hyperlora.runtime import Prompt, Runtime
from hyperlora.session import Session
from hyperlora.shared_state import SharedState
from hyperlora.structure import attention_outputs, find_sites

from .conftest import make_base, make_generator

BUDGET_TOKENS = 20


@pytest.fixture
def settings(base: BaseModel, tmp_path: Path) -> dict[str, dict[str, object]]:
    """The least that each method needs to run on a tiny base."""
    make_generator(base).save_pretrained(tmp_path / "generator")
    adapter = {
        path: (a, torch.randn_like(b)) for path, (a, b) in fresh_adapter(base, 4, find_sites(base.model), 0).items()
    }
    SharedState("adapted", adapter=adapter).save(tmp_path / "adapted", base)
    return {
        "generator": {"path": str(tmp_path / "generator")},
        "adapted_full": {"path": str(tmp_path / "adapted")},
        "distillation": {"rank": 2, "conversations": 16, "reply_tokens": 6, "steps": 6, "check": 3, "batch": 4},
    }


def make(name: str, base: BaseModel, settings: dict[str, dict[str, object]], seed: int = 0) -> Method:
    if name == "summary":
        pytest.importorskip("sentencex")
        pytest.importorskip("sklearn")
    kind = METHODS[name]
    return kind(base, kind.Settings(**settings.get(name, {})), seed)


def budgets(method: Method, base: BaseModel, count: int) -> list[int] | None:
    return [BUDGET_TOKENS * base.kv_bytes_per_token] * count if method.budgeted else None


def scores(base: BaseModel, memories: list[Memory]) -> list[torch.Tensor]:
    runtime = Runtime(base)
    return runtime.log_likelihood(
        memories, [runtime.question(i, "What is the parrot called?", "Admiral") for i in range(len(memories))]
    )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_memory_is_of_its_document_alone(
    base: BaseModel, documents: list[str], settings: dict[str, dict[str, object]], name: str
) -> None:
    """Alone, in company, in another order and made again it answers the same; another document's answers otherwise."""
    held = [Document(str(number), text) for number, text in enumerate(documents[:2])]
    method = make(name, base, settings)
    both = scores(base, method.compile(held, budgets(method, base, 2)))
    turned = make(name, base, settings)
    for again in (
        [scores(base, method.compile([one], budgets(method, base, 1)))[0] for one in held],
        scores(base, turned.compile(held[::-1], budgets(turned, base, 2)))[::-1],
    ):
        for one, other in zip(both, again, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    differ = not torch.allclose(both[0], both[1], atol=1e-4)
    assert differ is (name != "none")
    assert method.summary().endswith((".", ":")) and method.name == name


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.budgeted))
def test_budgets_are_kept_and_used(
    base: BaseModel, documents: list[str], settings: dict[str, dict[str, object]], name: str
) -> None:
    text = " ".join(documents)
    method, document = make(name, base, settings), Document("a", text)
    assert len(document_ids(base.tokenizer, text)) > 2 * BUDGET_TOKENS
    (small,) = method.compile([document], [BUDGET_TOKENS * base.kv_bytes_per_token + 1])
    assert small.resident_bytes(base) == BUDGET_TOKENS * base.kv_bytes_per_token
    (whole,) = method.compile([document], [10**9])
    expected = scores(base, [Memory(text=tuple(document_ids(base.tokenizer, text)))])
    torch.testing.assert_close(scores(base, [whole]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.seeded))
def test_other_seeds_give_other_memories(
    base: BaseModel, documents: list[str], settings: dict[str, dict[str, object]], name: str
) -> None:
    document = Document("a", documents[0])
    one, other = (make(name, base, settings, seed) for seed in (0, 1))
    memories = [method.compile([document], budgets(method, base, 1))[0] for method in (one, other)]
    assert not torch.equal(*scores(base, memories))


@pytest.mark.parametrize(("side", "head", "tail"), [("head", 5, 0), ("tail", 0, 5), ("both", 3, 2)])
def test_truncation_keeps_the_side_that_is_asked_for(
    base: BaseModel, documents: list[str], side: str, head: int, tail: int
) -> None:
    kind, ids = METHODS["truncation"], document_ids(base.tokenizer, documents[0])
    (memory,) = kind(base, kind.Settings(side=side)).compile(
        [Document("x", documents[0])], [5 * base.kv_bytes_per_token]
    )
    assert list(memory.text) == ids[:head] + ids[len(ids) - tail :]


def test_summary_ranks_by_centrality_and_not_by_place() -> None:
    pytest.importorskip("sentencex")
    pytest.importorskip("sklearn")
    text = (
        "A cloud passed. The ferry carries salt to the island. The ferry to the island carries salt and mail. "
        "Salt and mail reach the island by ferry. Somebody sneezed."
    )
    pieces = sentences(text)
    assert "".join(pieces) == text and len(pieces) == 5
    assert set(ranking(pieces)[:3]) == {1, 2, 3}
    assert ranking(["?", "!"]) == [0, 1]


def test_the_prompt_goes_on_behind_the_document_though_its_end_is_evicted(
    base: BaseModel, documents: list[str]
) -> None:
    ids = document_ids(base.tokenizer, documents[0])
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[-5:] = False
    before = len(encode(base.tokenizer, base.prompt.prefix))
    end = before + len(ids)
    (memory,) = Runtime(base).prefill([Memory(text=tuple(ids))])
    assert memory.kv is not None
    kv = memory.kv.select(torch.cat([torch.zeros(before, dtype=torch.bool), kept]))
    assert (kv.next_place, kv.next_position) == (end, end) and kv.positions.numel() == end - 5
    with Session(base, 1) as session:  # and stays there when it is loaded and taken again
        session.load([kv])
        assert session.take(0).next_position == end


def test_random_eviction_keeps_the_prefix_and_frees_the_rest(base: BaseModel, documents: list[str]) -> None:
    kind = METHODS["random_eviction"]
    method = kind(base, kind.Settings())
    (memory,) = method.compile([Document("x", documents[0])], [BUDGET_TOKENS * base.kv_bytes_per_token])
    assert memory.kv is not None
    prefix = len(encode(base.tokenizer, base.prompt.prefix))
    positions, rows = memory.kv.positions.tolist(), prefix + BUDGET_TOKENS
    assert positions[:prefix] == list(range(prefix)) and len(positions) == rows
    assert positions[prefix:] != list(range(prefix, rows))
    assert memory.kv.next_position == prefix + len(document_ids(base.tokenizer, documents[0]))
    assert all(keys.shape[1] == rows for keys in memory.kv.keys)


def test_self_study_is_told_by_the_document(base: BaseModel, documents: list[str]) -> None:
    """The teacher's opinion equals a plain pass with the document in the prompt, whatever it was packed with."""
    held = study(base, Document("a", documents[0]), seed=0, conversations=16, reply_tokens=6, chunk_tokens=20)
    manners = {conversation.manner for conversation in held}
    assert manners <= {*SEEDS, *COPIES} and manners >= {*COPIES} and len(manners) >= 5
    contexts = {tuple(conversation.context) for conversation in held}
    assert len(contexts) > 1
    assert sum(c.manner == "recitation" for c in held) == len(contexts)
    asked = [(tuple(c.context), c.question) for c in held if c.manner != "quotation"]
    assert len(set(asked)) == len(asked)
    quoted = [c for c in held if c.manner == "quotation"]
    assert len(quoted) == 16 // 5 and all((tuple(c.context), c.question) in asked for c in quoted)
    for c in quoted:
        text = base.tokenizer.decode(c.reply, skip_special_tokens=True).strip()
        assert text and text in base.tokenizer.decode(c.context)
    runtime = Runtime(base)
    for conversation, lesson in zip(held, teach(base, held, [0, 2], top_k=7, batch=3), strict=True):
        prompt = runtime.question(0, conversation.question)
        assert (lesson.question, lesson.reply) == (prompt.ids, conversation.reply)
        text = base.tokenizer.decode(conversation.context)
        ids = base.prompt.prompt_ids(base.tokenizer, conversation.question, text) + conversation.reply[:-1]
        with torch.no_grad():
            plain = base.model(torch.tensor([ids]), output_hidden_states=True)
        log_probs = plain.logits[0, -len(conversation.reply) :].float().log_softmax(-1)
        expected = log_probs.gather(1, lesson.top_ids)
        assert lesson.top_ids.shape == (len(conversation.reply), 7)
        torch.testing.assert_close(lesson.top_log_probs, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected, log_probs.topk(7).values, rtol=1e-4, atol=1e-4)
        tokens = len(lesson.question) + len(lesson.reply) - 1
        states = torch.stack([plain.hidden_states[layer + 1][0, -tokens:] for layer in (0, 2)])
        torch.testing.assert_close(lesson.hidden, states.float(), rtol=1e-4, atol=1e-4)
        if conversation.manner not in COPIES:  # greedy replies: each token is the teacher's likeliest
            assert lesson.top_ids[:, 0].tolist() == conversation.reply


def test_a_chat_has_no_document_and_a_lesson_from_it_is_the_bare_model_s(base: BaseModel) -> None:
    held, again, other = (chat(base, seed, conversations=8, reply_tokens=5) for seed in (0, 0, 1))
    assert 4 <= len(held) <= 8 and len({c.question for c in held}) > 3 and held == again != other
    assert all(c.context == [] and 0 < len(c.reply) <= 5 for c in held)
    lessons = teach(base, held, [0, 3], attention_outputs(base.model, [1]))
    kl, surprise, far = differences(base, lessons, [0, 3])
    assert abs(float(kl)) < 1e-4 and float(far.max()) < 1e-6
    likeliest = torch.cat([lesson.top_log_probs[:, 0] for lesson in lessons])
    assert math.isclose(float(surprise), -float(likeliest.mean()), rel_tol=1e-4)


def test_an_empty_document_cannot_be_studied(base: BaseModel) -> None:
    with pytest.raises(InputError, match="document a is empty"):
        study(base, Document("a", " \n"), seed=0, conversations=16)


def test_self_study_keeps_to_the_window(base: BaseModel) -> None:
    """In a smaller window the document comes in more chunks; too small a window is an error."""
    document = Document("a", "A grey parrot knows eleven songs. " * 60)
    examples = len(document_ids(base.tokenizer, EXAMPLES))

    def chunks(window: int) -> int:
        base.model.config.max_position_embeddings = window
        held = study(base, document, seed=0, conversations=16, reply_tokens=4)
        return sum(conversation.manner == "recitation" for conversation in held)

    assert chunks(examples + 250) > 2 * chunks(examples + 1000)
    with pytest.raises(InputError, match="a window of 600 tokens; self-study needs"):
        chunks(600)


def test_distillation_moves_the_student_to_the_teacher(documents: list[str]) -> None:
    """On questions that it was not trained on; another document's patch does not do it."""
    base = make_base()
    kind = METHODS["distillation"]
    training = {"steps": 80, "check": 20, "learning_rate": 1e-2, "hard_weight": 0}  # judged by the divergence
    settings = kind.Settings(rank=8, conversations=24, reply_tokens=8, **training)
    held = [Document(str(number), text) for number, text in enumerate(documents[:2])]
    own, other = kind(base, settings).compile(held)
    fresh = [c for c in study(base, held[0], seed=7, conversations=15, reply_tokens=8) if c.manner not in COPIES]
    lessons = teach(base, fresh, [1, 3])
    runtime = Runtime(base)

    def divergence(memory: Memory) -> float:
        prompts = [Prompt(0, lesson.question, lesson.reply) for lesson in lessons]
        logits = runtime.scored([memory], prompts, lambda x, _: x)
        pairs = zip(logits, lessons, strict=True)
        return sum(float(top_k_kl(x, c.top_ids, c.top_log_probs)) for x, c in pairs) / sum(map(len, logits))

    def distance(memory: Memory) -> torch.Tensor:
        factors = None if memory.patch is None else stack_patches([memory.patch], base.device)
        with torch.no_grad():
            return differences(base, lessons, [1, 3], factors)[2]

    teacher = Memory(text=tuple(document_ids(base.tokenizer, documents[0])))
    none, mine, swapped = divergence(Memory()), divergence(own), divergence(other)
    assert divergence(teacher) < 1e-4 < none
    assert mine < 0.8 * none and mine < 0.9 * swapped
    assert distance(own)[1] < 0.95 * distance(Memory())[1] and distance(own)[1] < distance(other)[1]


@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "down_proj"]])
def test_only_the_outputs_of_the_mlp_start_from_the_regression(
    base: BaseModel, documents: list[str], modules: list[str]
) -> None:
    kind = METHODS["distillation"]
    settings = kind.Settings(rank=2, conversations=16, reply_tokens=4, steps=0, modules=modules, layers=[1, 2])
    (memory,) = kind(base, settings).compile([Document("a", documents[0])])
    assert memory.patch is not None and len(memory.patch.factors) == 2 * len(modules)
    for path, (_, b) in memory.patch.factors.items():
        assert bool(b.abs().max() > 0) == path.endswith("down_proj")


def test_distillation_starts_from_the_mean_of_two_regressions(
    base: BaseModel, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each over half of the lessons and with half of the rank, one making up only a share of what is missing."""
    kind, calls = METHODS["distillation"], []

    def spied(base: BaseModel, lessons: Any, attention: Any, sites: Any, rank: int, ridge: float, **more: Any) -> Any:
        found = fit(base, lessons, attention, sites, rank, ridge, **more)
        calls.append((lessons, rank, more["share"], found))
        return found

    monkeypatch.setattr(distillation, "fit", spied)
    settings = kind.Settings(rank=5, conversations=16, reply_tokens=4, steps=0, share=0.25, strength=1.5)
    (memory,) = kind(base, settings).compile([Document("a", documents[0])])
    (one, rank, share, first), (two, other_rank, other_share, second) = calls
    assert (rank, other_rank, share, other_share) == (3, 2, 1.0, 0.25)
    assert abs(len(one) - len(two)) <= 1
    texts = [{(*lesson.question, *lesson.reply) for lesson in part} for part in (one, two)]
    assert not texts[0] & texts[1]
    assert memory.patch is not None and set(memory.patch.factors) == set(first) == set(second)
    for path, (a, b) in memory.patch.factors.items():
        mean = sum(torch.matmul(*reversed(found[path]))[0] for found in (first, second)) / 2
        torch.testing.assert_close(b @ a, 1.5 * mean, atol=1e-5, rtol=1e-4)


def test_distillation_stops_early_and_keeps_the_best(
    base: BaseModel, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of the unseen lessons: none, then best at the second check; three worse ones in a row end the training."""
    kind = METHODS["distillation"]
    settings = kind.Settings(rank=2, conversations=16, reply_tokens=4, steps=99, check=2, patience=3, batch=4)
    method = kind(base, settings)
    score, scored, kept = method._score, iter([5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 0.0]), []

    def told(factors: Any, lessons: Any, layers: Any) -> Any:
        found = score(factors, lessons, layers)
        if len(lessons) > 1:  # the distance at the start, over the lessons that are trained on
            return found
        kept.append(None if factors is None else next(iter(factors.values()))[1].clone())
        return next(scored), found[1]

    monkeypatch.setattr(method, "_score", told)
    (memory,) = method.compile([Document("a", documents[0])])
    assert len(kept) == 1 + 5 and memory.patch is not None
    assert torch.equal(next(iter(memory.patch.factors.values()))[1], kept[2][0])
    assert not torch.equal(kept[2], kept[5])


def test_hard_targets_make_the_student_surer_of_the_replies(base: BaseModel, documents: list[str]) -> None:
    kind, document = METHODS["distillation"], Document("a", documents[0])
    lessons = teach(base, study(base, document, seed=0, conversations=16, reply_tokens=6), [3])
    shared = {"rank": 8, "conversations": 16, "reply_tokens": 6, "steps": 40, "learning_rate": 1e-2, "ridge": None}
    found = []
    for weight in (0.0, 4.0):
        (memory,) = kind(base, kind.Settings(hard_weight=weight, **shared)).compile([document])
        assert memory.patch is not None
        with torch.no_grad():
            found.append(differences(base, lessons, [3], stack_patches([memory.patch], base.device))[:2])
    (soft_kl, soft), (hard_kl, hard) = found
    assert hard < soft and soft_kl < hard_kl


def test_top_k_divergence_equals_the_full_one_when_all_tokens_are_kept() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11), torch.randn(5, 11).log_softmax(-1)
    values, ids = teacher.topk(11)
    full = torch.nn.functional.kl_div(student.log_softmax(-1), teacher, reduction="sum", log_target=True)
    assert math.isclose(float(top_k_kl(student, ids, values)), float(full), rel_tol=1e-3)
    few, few_ids = teacher.topk(4)
    assert abs(float(top_k_kl(teacher, few_ids, few))) < 1e-4
    assert 0 < float(top_k_kl(student, few_ids, few)) < float(full)


def test_trained_state_is_checked(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable trained state"):
        METHODS["adapted_full"](base, METHODS["adapted_full"].Settings(path=str(tmp_path)))
    with pytest.raises(Exception, match="extra"):
        METHODS["full"].Settings(sides="head")
