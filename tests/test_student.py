"""What a student is asked, and that it is off by as much however its rows run."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

from hyperlora.base_model import BaseModel
from hyperlora.drawing import Drawing
from hyperlora.leaves import leaves_of
from hyperlora.recipe import Beside, Recipe, Teacher
from hyperlora.training import Trainer

from .conftest import make_base, make_generator
from .test_training import trainer


def test_rows_of_a_document_in_one_sequence_are_what_they_are_alone(
    recipe: Recipe, tmp_path: Path, any_base: BaseModel
) -> None:
    """Losses and gradients, with hidden states to match: packed, padded and row by row."""
    recipe.documents, recipe.teacher = 6, Teacher(hidden=0.1, hidden_layers=2)
    recipe.mix[0].questions = 3
    generator = make_generator(any_base)
    student = Trainer(recipe, generator, tmp_path / "run").student
    assert student.packs
    micro = next(Drawing(recipe, any_base, student).steps(0)).micro[0]
    assert max(Counter(row.document for row in micro.rows).values()) == 3
    with torch.no_grad():
        factors = generator.factors([generator.encoder.tokenize(item.text) for item in micro.items])
    labels, found = sum(row.labels for row in micro.rows), []
    for packs, groups in ((True, [micro.rows]), (False, [micro.rows]), (False, [[row] for row in micro.rows])):
        student.packs, leaves = packs, leaves_of(factors)
        parts = [student.losses(leaves, rows, labels) for rows in groups]
        gradients = [tensor.grad for pair in leaves.values() for tensor in pair if tensor.grad is not None]
        sums = {name: sum(part.get(name, 0.0) for part in parts) for name in ("loss", "hidden")}
        found.append((sums, torch.cat([gradient.flatten() for gradient in gradients])))
    (slow, expected), others = found[-1], found[:-1]
    for sums, gradient in others:
        assert sums == pytest.approx(slow, rel=1e-4)
        assert float((gradient - expected).norm()) < 1e-4 * float(expected.norm())


def test_a_base_that_takes_no_masks_is_trained_row_by_row(recipe: Recipe, tmp_path: Path, base: BaseModel) -> None:
    config = FalconConfig(
        vocab_size=len(base.tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, alibi=True
    )
    torch.manual_seed(0)
    falcon = BaseModel("falcon", AutoModelForCausalLM.from_config(config), base.tokenizer)
    run = Trainer(recipe, make_generator(falcon), tmp_path / "run")
    assert not run.student.packs
    first = run.train_step()
    assert math.isfinite(first["loss"]) and first["gradient_norm"] > 0


def test_prompts_beside_a_patch_ask_about_themselves(recipe: Recipe, tmp_path: Path) -> None:
    """Each row has the patch of one document on and the next one of the step in its prompt, with that one's answer."""
    recipe.mix, recipe.beside, recipe.unrelated = recipe.mix[:1], Beside(share=1.0), None
    recipe.documents, recipe.micro_batches = 2, 2
    run = trainer(recipe, tmp_path / "run")
    tokenizer, (micro, *_) = run.base.tokenizer, next(run.drawing.steps(0))
    items = [item for part in micro for item in part.items]
    rows = [(2 * number + row.document, row) for number, part in enumerate(micro) for row in part.beside]
    assert [owner for owner, _ in rows] == [0, 1, 2, 3]
    for owner, row in rows:
        other = items[(owner + 1) % 4]
        asked = tokenizer.decode(row.ids[: row.start])
        (question,) = [q for q in other.questions if q.text in asked]
        assert other.text in asked and items[owner].text not in asked
        assert tokenizer.decode(row.ids[row.start :]).startswith(question.reply)
    metrics = run.train_step()
    assert 0 < metrics["beside"] < 20
    recipe.beside.share = 0.0
    assert trainer(recipe, tmp_path / "none").train_step()["beside"] == 0


def test_unrelated_text_may_stand_in_a_prompt(recipe: Recipe, tmp_path: Path) -> None:
    prefix = tuple(trainer(recipe, tmp_path / "run").base.prompt.prompt_ids(make_base().tokenizer, ""))[:3]
    starts = {}
    for share in (0.0, 1.0):
        changed = recipe.model_copy(update={"unrelated": recipe.unrelated.model_copy(update={"in_prompt": share})})  # type: ignore[union-attr]
        steps = trainer(changed, tmp_path / "run").drawing.steps(0)
        rows = [row for _ in range(3) for part in next(steps).micro for row in part.unrelated]
        starts[share] = {tuple(row.ids[:3]) == prefix for row in rows}
    assert starts == {0.0: {False}, 1.0: {True}}
