"""Which attention kernel a pass takes, and that its gradients stay what they are."""

from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from hyperlora.attention import attention
from hyperlora.base_model import BaseModel
from hyperlora.inject import inject
from hyperlora.recipe import Beside, Recipe
from hyperlora.training import Trainer

from .conftest import make_base, make_generator

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


def gradient(base: BaseModel, tokens: int) -> tuple[torch.Tensor, set[str]]:
    """Of the mean square of the logits in the factors of a patch, and the names of the operations."""
    torch.manual_seed(0)
    path = "model.layers.1.self_attn.q_proj"
    module = base.model.get_submodule(path)
    a = torch.randn(1, 2, module.in_features).requires_grad_()
    b = torch.randn(1, module.out_features, 2).requires_grad_()
    ids = torch.randint(3, 50, (2, tokens))
    with profile() as found, attention(base, tokens), inject(base.model, {path: (a, b)}):
        base.model(input_ids=ids).logits.float().pow(2).mean().backward()
    assert a.grad is not None and b.grad is not None
    return torch.cat([a.grad.flatten(), b.grad.flatten()]), {event.key for event in found.key_averages()}


@pytest.mark.parametrize(
    ("dtype", "tokens", "fused"),
    [(torch.bfloat16, 100, False), (torch.bfloat16, 300, True), (torch.float32, 100, True)],
)
def test_short_passes_in_bfloat16_take_products(dtype: torch.dtype, tokens: int, fused: bool) -> None:
    base = make_base()
    base.model.to(dtype)
    assert (FUSED in gradient(base, tokens)[1]) == fused


def test_a_pass_without_gradient_stays_fused() -> None:
    base = make_base()
    base.model.to(torch.bfloat16)
    with profile() as found, torch.no_grad(), attention(base, 40):
        base.model(input_ids=torch.randint(3, 50, (2, 40)))
    assert FUSED in {event.key for event in found.key_averages()}


def test_gradients_are_those_of_float32() -> None:
    whole = make_base()
    exact, _ = gradient(whole, 100)
    whole.model.to(torch.bfloat16)
    found, names = gradient(whole, 100)
    assert FUSED not in names and (found - exact).norm() < 0.05 * exact.norm()


def test_a_training_step_goes_back_through_the_faster_kernel(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through documents, questions, prompts beside a patch and unrelated text."""
    monkeypatch.setattr("hyperlora.attention._SHORT", 4096)  # the tiny tokenizer knows letters
    base = make_base()
    base.model.to(torch.bfloat16)
    recipe = recipe.model_copy(update={"beside": Beside(share=1.0)})
    run = Trainer(recipe, make_generator(base, **recipe.generator.model_dump()), tmp_path)
    with profile() as found:
        losses = run.train_step()
    assert losses["loss"] > 0 and losses["beside"] > 0 and losses["unrelated"] > 0
    fused = [event for event in found.events() if event.name == f"{FUSED}_backward"]
    assert len(fused) == 1  # the hypernetwork's own, in float32
