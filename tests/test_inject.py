import copy

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.evaluation.answers import greedy
from hyperlora.inject import inject, patched

from .conftest import make_generator


def test_injection_equals_merged_weights(any_base: BaseModel, documents: list[str]) -> None:
    patches = make_generator(any_base).generate(documents[:3])
    ids = torch.randint(3, 200, (3, 12))
    bare = any_base.model(ids).logits
    with patched(any_base.model, patches):
        together = any_base.model(ids).logits
    for row, patch in enumerate(patches):
        merged = copy.deepcopy(any_base.model)
        patch.merge(merged)
        torch.testing.assert_close(together[row], merged(ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)
        assert (together[row] - bare[row]).abs().max() > 0.01
    torch.testing.assert_close(any_base.model(ids).logits, bare, rtol=0, atol=0)


def test_questions_share_their_documents_patch(base: BaseModel, documents: list[str]) -> None:
    patches = make_generator(base).generate(documents[:2])
    ids = torch.randint(3, 200, (4, 9))
    with patched(base.model, patches, rows=torch.tensor([1, 0, 0, 1])):
        mixed = base.model(ids).logits
    with patched(base.model, patches):
        grouped = base.model(ids[[1, 2, 0, 3]]).logits
    torch.testing.assert_close(mixed[[1, 2, 0, 3]], grouped)
    with patched(base.model, patches, rows=torch.tensor([1, 1, 0, 0])):
        swapped = base.model(ids[[0, 3, 1, 2]]).logits
    torch.testing.assert_close(mixed[[0, 3, 1, 2]], swapped)
    with patched(base.model, patches), pytest.raises(ValueError, match="cannot be shared out"):
        base.model(ids[:3])


@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_equals_merged_weights(any_base: BaseModel, documents: list[str], beams: int) -> None:
    patches = make_generator(any_base).generate(documents[:2])
    ids = torch.randint(3, 200, (2, 7))
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": 2, "pad_token_id": 1}
    with patched(any_base.model, patches):
        out = any_base.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for row, patch in enumerate(patches):
        merged = copy.deepcopy(any_base.model)
        patch.merge(merged)
        one = ids[row : row + 1]
        alone = merged.generate(one, attention_mask=torch.ones_like(one), **options)[0]
        assert out[row, : len(alone)].tolist() == alone.tolist()


def test_left_padding_does_not_change_a_reply(base: BaseModel, documents: list[str]) -> None:
    patches = make_generator(base).generate(documents[:2])
    prompts = [base.prompt.prompt_ids(base.tokenizer, q) for q in ("Who?", "When does the ferry leave?")]
    with patched(base.model, patches):
        together = greedy(base, prompts, 8)
    for patch, prompt, reply in zip(patches, prompts, together, strict=True):
        with patched(base.model, patch):
            assert greedy(base, [prompt], 8) == [reply]


def test_gradient_under_activation_checkpointing(base: BaseModel, documents: list[str]) -> None:
    generator = make_generator(base)
    ids = torch.randint(3, 200, (2, 9))

    def gradients(leaves: bool) -> list[torch.Tensor]:
        generator.zero_grad()
        factors = generator.factors([generator.encoder.tokenize(text) for text in documents[:2]])
        used = {p: tuple(t.detach().requires_grad_() for t in f) for p, f in factors.items()} if leaves else factors
        with inject(base.model, used):
            base.model(ids, labels=ids, use_cache=False).loss.backward()
        if leaves:  # a reentrant checkpoint runs backward once per layer, so the graph behind A and B comes last
            pairs = [(t, leaf.grad) for p in factors for t, leaf in zip(factors[p], used[p], strict=True)]
            torch.autograd.backward(*zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True))
        return [p.grad.clone() for p in generator.hypernet.parameters()]

    plain = gradients(leaves=False)
    assert any(g.any() for g in plain)
    for reentrant in (False, True):
        base.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        base.model.enable_input_require_grads()
        base.model.train()
        for one, other in zip(plain, gradients(leaves=reentrant), strict=True):
            assert (one - other).norm() <= 1e-3 * one.norm() + 1e-6


def test_hooks_go_away_after_an_error(base: BaseModel, generator: object, documents: list[str]) -> None:
    patch = make_generator(base).generate(documents[0])
    with pytest.raises(RuntimeError, match="stop"), patched(base.model, patch):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in base.model.modules())
