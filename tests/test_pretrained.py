"""The shipped generator on the real base model."""

from pathlib import Path

import pytest
import torch

from hyperlora.base_model import BaseModel, load_base
from hyperlora.evaluation.answers import greedy
from hyperlora.evaluation.controls import score_controls
from hyperlora.evaluation.items import fact_items
from hyperlora.generator import Generator
from hyperlora.inject import patched
from hyperlora.patch import Patch

pytestmark = pytest.mark.model
WEIGHTS = Path(__file__).parents[1] / "hyperlora" / "pretrained" / "model.safetensors"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base()


@pytest.fixture(scope="module")
def generator(base: BaseModel) -> Generator:
    return Generator.from_pretrained(base=base)


def test_weights_are_small_enough_to_ship() -> None:
    assert WEIGHTS.stat().st_size <= 25_000_000


def test_base_knows_what_everyone_knows(base: BaseModel) -> None:
    prompt = base.prompt.prompt_ids(base.tokenizer, "What is the capital of France?")
    assert "Paris" in greedy(base, [prompt], 16)[0]


def test_new_facts_come_from_the_right_patch(generator: Generator) -> None:
    scores = score_controls(generator, fact_items(2, 12))
    assert scores["patch_exact_match"] >= 0.75
    assert scores["swapped_exact_match"] <= 0.1


def test_a_patch_is_the_same_alone_batched_and_permuted(generator: Generator) -> None:
    """Within 1e-5 of the patch's norm, for documents of some 30, 100 and 400 tokens, at a rank of 64."""
    crew = (Path(__file__).parents[1] / "examples" / "crew.txt").read_text()
    documents = [item.text for item in fact_items(2, 3) + fact_items(8, 3) + fact_items(32, 1)] + [crew]
    together = generator.generate(documents)
    permuted = generator.generate(documents[::-1])[::-1]
    for document, *others in zip(documents, together, permuted, strict=True):
        alone = update(generator.generate(document))
        for other in others:
            assert (update(other) - alone).norm() <= 1e-5 * alone.norm()


def update(patch: Patch) -> torch.Tensor:
    return torch.cat([(b.double() @ a.double()).flatten() for a, b in patch.factors.values()])


def test_batched_patches_answer_like_single_ones(generator: Generator) -> None:
    items = fact_items(2, 3)
    together = generator.generate([item.text for item in items])
    question = items[1].questions[0]
    prompt = generator.base.prompt.prompt_ids(generator.base.tokenizer, question.text)
    replies = []
    for patch in (together[1], generator.generate(items[1].text)):
        with patched(generator.base.model, patch):
            replies.append(greedy(generator.base, [prompt], 16)[0])
    assert replies[0] == replies[1]
