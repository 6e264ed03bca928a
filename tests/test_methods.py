"""One matrix over all methods, and what each one owes besides."""

import math
from pathlib import Path

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.memory import Memory
from hyperlora.methods import METHODS, Document, Method
from hyperlora.methods.adapted import fresh_adapter
from hyperlora.methods.self_study import SEEDS, study
from hyperlora.methods.summary import ranking, sentences
from hyperlora.objectives import top_k_kl
from hyperlora.prompt import document_ids
from hyperlora.runtime import Runtime
from hyperlora.shared_state import SharedState

from .conftest import make_base, make_generator

BUDGET_TOKENS = 20


@pytest.fixture
def settings(base: BaseModel, tmp_path: Path) -> dict[str, dict[str, object]]:
    """The least that each method needs to run on a tiny base."""
    make_generator(base).save_pretrained(tmp_path / "generator")
    adapter = {path: (a, torch.randn_like(b)) for path, (a, b) in fresh_adapter(base, 4, None, 0).items()}
    SharedState("adapted", adapter=adapter).save(tmp_path / "adapted", base)
    return {
        "generator": {"path": str(tmp_path / "generator")},
        "adapted_full": {"path": str(tmp_path / "adapted")},
        "distillation": {"rank": 2, "conversations": 8, "reply_tokens": 6, "steps": 6, "check": 3, "batch": 4},
    }


def make(name: str, base: BaseModel, settings: dict[str, dict[str, object]], seed: int = 0) -> Method:
    if name == "summary":
        pytest.importorskip("sentencex")
        pytest.importorskip("sklearn")
    kind = METHODS[name]
    return kind(base, kind.Settings(**settings.get(name, {})), seed)


def per_token(base: BaseModel) -> int:
    return 2 * base.kv_bytes_per_token // base.model.dtype.itemsize


def budgets(method: Method, base: BaseModel, count: int) -> list[int] | None:
    return [BUDGET_TOKENS * per_token(base)] * count if method.budgeted else None


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
    (small,) = method.compile([document], [BUDGET_TOKENS * per_token(base) + 1])
    assert small.resident_bytes(base) == BUDGET_TOKENS * per_token(base)
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
    (memory,) = kind(base, kind.Settings(side=side)).compile([Document("x", documents[0])], [5 * per_token(base)])
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


def test_random_eviction_keeps_the_prefix_and_frees_the_rest(base: BaseModel, documents: list[str]) -> None:
    kind = METHODS["random_eviction"]
    method = kind(base, kind.Settings())
    (memory,) = method.compile([Document("x", documents[0])], [BUDGET_TOKENS * per_token(base)])
    assert memory.kv is not None
    prefix = len(Runtime(base)._prefix)
    positions = memory.kv.positions.tolist()
    assert positions[:prefix] == list(range(prefix)) and len(positions) == BUDGET_TOKENS
    assert positions[prefix:] != list(range(prefix, BUDGET_TOKENS))
    assert memory.kv.next_position == prefix + len(document_ids(base.tokenizer, documents[0]))
    assert all(keys.shape[1] == BUDGET_TOKENS for keys in memory.kv.keys)


def test_self_study_is_told_by_the_document_and_scores_its_own_replies(base: BaseModel, documents: list[str]) -> None:
    held = study(base, Document("a", documents[0]), seed=0, conversations=10, reply_tokens=6, top_k=7)
    manners = {conversation.manner for conversation in held}
    assert manners <= {*SEEDS, "recitation"} and "recitation" in manners and len(manners) >= 4
    runtime, text = Runtime(base), Memory(text=tuple(document_ids(base.tokenizer, documents[0])))
    for conversation in held:
        assert conversation.top_ids.shape == conversation.top_log_probs.shape == (len(conversation.reply), 7)
        prompt = runtime.question(0, conversation.question)
        (taught,) = runtime.log_likelihood([text], [type(prompt)(0, prompt.ids, conversation.reply)])
        if conversation.manner != "recitation":  # greedy replies: each token is the teacher's likeliest
            assert conversation.top_ids[:, 0].tolist() == conversation.reply
            torch.testing.assert_close(conversation.top_log_probs[:, 0], taught, rtol=1e-3, atol=1e-3)


def test_distillation_moves_the_student_to_the_teacher(documents: list[str]) -> None:
    """On questions that it was not trained on; another document's patch does not do it."""
    base = make_base()
    kind = METHODS["distillation"]
    settings = kind.Settings(rank=8, conversations=24, reply_tokens=8, steps=80, check=20, learning_rate=1e-2)
    held = [Document(str(number), text) for number, text in enumerate(documents[:2])]
    own, other = kind(base, settings).compile(held)
    fresh = [c for c in study(base, held[0], seed=7, conversations=15, reply_tokens=8) if c.manner != "recitation"]
    runtime = Runtime(base)

    def divergence(memory: Memory) -> float:
        prompts = [runtime.question(0, c.question) for c in fresh]
        prompts = [type(p)(0, p.ids, c.reply) for p, c in zip(prompts, fresh, strict=True)]
        logits = runtime.scored([memory], prompts, lambda x, _: x)
        pairs = zip(logits, fresh, strict=True)
        return sum(float(top_k_kl(x, c.top_ids, c.top_log_probs)) for x, c in pairs) / sum(map(len, logits))

    teacher = Memory(text=tuple(document_ids(base.tokenizer, documents[0])))
    none, mine, swapped = divergence(Memory()), divergence(own), divergence(other)
    assert divergence(teacher) < 1e-4 < none
    assert mine < 0.8 * none and mine < 0.9 * swapped


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
