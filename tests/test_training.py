from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from hyperlora.activations import checkpoint_layers
from hyperlora.base_model import BaseModel
from hyperlora.data.ahead import ahead
from hyperlora.data.overlap import Overlap
from hyperlora.engine import PlainEngine
from hyperlora.errors import InputError, OutOfMemory, TrainingDiverged
from hyperlora.generator import Generator
from hyperlora.generator_config import GeneratorConfig
from hyperlora.hypernet import HYPERNETS
from hyperlora.recipe import Beside, Recipe, read_recipe
from hyperlora.training import Trainer, start

from .conftest import OPTIONS, make_base, make_generator

each_hypernet = pytest.mark.parametrize("name", sorted(HYPERNETS))


def trainer(recipe: Recipe, folder: Path, base: BaseModel | None = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(recipe, make_generator(base or make_base(), **recipe.generator.model_dump()), folder)


def of(recipe: Recipe, name: str) -> Recipe:
    """The recipe with another architecture."""
    settings = {"hypernet": name, "options": OPTIONS[name]}
    return recipe.model_copy(update={"generator": recipe.generator.model_copy(update=settings)})


@each_hypernet
def test_training_lowers_the_loss(recipe: Recipe, tmp_path: Path, name: str) -> None:
    recipe = of(recipe, name)
    recipe.mix, recipe.steps = recipe.mix[1:2], 30
    run = trainer(recipe, tmp_path / "run")
    history = [run.train_step()["loss"] for _ in range(30)]
    assert history[-1] < 0.92 * history[0]


def test_micro_batches_divide_by_all_labels(recipe: Recipe, tmp_path: Path) -> None:
    """Gradients of two micro-batches of three documents, or of six of one, equal those of one batch of six, those from
    a teacher's hidden states too."""
    recipe.teacher.hidden, recipe.teacher.hidden_layers = 1.0, 2
    gradients = []
    for documents, micro in ((6, 1), (3, 2), (1, 6)):
        changed = recipe.model_copy(update={"documents": documents, "micro_batches": micro, "clip": 1e9})
        run = trainer(changed, tmp_path / str(micro))
        assert isinstance(run.engine, PlainEngine)
        caught: list[torch.Tensor] = []
        run.engine.optimizer.register_step_pre_hook(
            lambda o, *_, c=caught: c.extend(p.grad.clone() for g in o.param_groups for p in g["params"])
        )
        assert run.train_step()["hidden"] > 0
        gradients.append(caught)
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            assert (one - other).norm() < 2e-3 * one.norm() + 1e-6


def test_processes_that_find_different_checkpoints_are_refused(
    recipe: Recipe, tmp_path: Path, tiny_dirs: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.base = tiny_dirs[0]
    monkeypatch.setattr("hyperlora.ranks.agree", lambda number: number != -1)
    with pytest.raises(InputError, match="all machines must share this folder"):
        start(recipe, tmp_path / "run", "x")
    assert not (tmp_path / "run").exists()


def test_a_run_that_died_at_once_can_be_started_again(recipe: Recipe, tmp_path: Path, tiny_dirs: tuple) -> None:
    recipe.base = tiny_dirs[0]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    (tmp_path / "run" / "wandb-id").write_text("7")
    start(recipe, tmp_path / "run", "x").run()
    again = start(recipe, tmp_path / "run", "x")
    assert again.step == recipe.steps
    (tmp_path / "run" / "checkpoint" / "optimizer.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged"):
        start(recipe, tmp_path / "run", "x")


def test_checkpointing_brings_no_dropout_of_the_layers_own() -> None:
    """OPT's layers apply it by themselves, whenever they are in training mode."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16
    )
    model, ids = OPTForCausalLM(config).eval(), torch.arange(20)[None]
    plain = model(ids).logits
    checkpoint_layers(model)
    assert config.dropout == 0.1 and all(block.training for block in model.model.decoder.layers)
    torch.testing.assert_close(model(ids).logits, plain)


@each_hypernet
def test_checkpointing_changes_the_memory_and_not_the_gradient(recipe: Recipe, tmp_path: Path, name: str) -> None:
    """Layers run twice; dropout inside them stays off."""
    gradients, runs = [], []
    for checkpointing in (False, True):
        base = make_base()
        for module in base.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        count = [0]
        base.model.model.layers[2].mlp.register_forward_pre_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        changed = of(recipe, name).model_copy(update={"checkpointing": checkpointing, "clip": 1e9})
        run = trainer(changed, tmp_path / str(checkpointing), base)
        assert isinstance(run.engine, PlainEngine)
        caught: list[torch.Tensor] = []
        run.engine.optimizer.register_step_pre_hook(
            lambda o, *_, c=caught: c.extend(p.grad.clone() for g in o.param_groups for p in g["params"])
        )
        count[0] = 0
        run.train_step()
        gradients.append(caught)
        runs.append(count[0])
    assert runs[1] > runs[0]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_a_process_that_draws_ahead_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    runs = [trainer(recipe, tmp_path / name) for name in ("here", "ahead")]
    runs[1].steps = ahead(partial(runs[1].drawing.steps, 0))
    assert [runs[0].train_step() for _ in range(12)] == [runs[1].train_step() for _ in range(12)]
    positions = [(run.step, run.drawing.position) for run in runs]
    assert positions[0] == positions[1]


def test_strengths_learn_at_a_rate_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    recipe.strength_rate, recipe.learning_rate, recipe.warmup = 1e-1, 1e-9, 0
    run = trainer(recipe, tmp_path / "run")
    before = {name: p.clone() for name, p in run.generator.hypernet.named_parameters()}
    run.train_step()
    moved = {n for n, p in run.generator.hypernet.named_parameters() if not torch.allclose(p, before[n], atol=1e-6)}
    assert moved and all(name.endswith(".scale") for name in moved)


def test_endless_nan_ends_the_run(recipe: Recipe, tmp_path: Path) -> None:
    run = trainer(recipe, tmp_path / "run")
    for parameter in run.generator.hypernet.parameters():
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        for _ in range(20):
            run.train_step()


def test_a_patch_that_is_not_finite_ends_the_run(recipe: Recipe, tmp_path: Path) -> None:
    """A factorisation meets it before any gradient does."""
    run = trainer(recipe, tmp_path / "run")
    with torch.no_grad():
        run.generator.hypernet.log_ridge.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        run.run()


def test_too_large_a_step_says_what_to_lower(recipe: Recipe, tmp_path: Path) -> None:
    run = trainer(recipe, tmp_path / "run")
    step = run.train_step
    run.train_step = lambda: step() if run.step < 3 else torch.empty(2**45)  # type: ignore[method-assign, return-value]
    advice = "lower documents and raise micro_batches to the same product or set checkpointing: true, and go on from"
    with pytest.raises(OutOfMemory, match=f"at documents: 3; {advice} the last checkpoint"):
        run.run()
    again = trainer(recipe, tmp_path / "run")
    assert again.resume() and again.step == 3


def no_memory(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA")


def test_what_cannot_be_lowered_is_not_named(recipe: Recipe, tmp_path: Path) -> None:
    run = trainer(recipe.model_copy(update={"checkpointing": True}), tmp_path / "run")
    run.train_step = no_memory  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory) as found:
        run.run()
    assert "checkpointing" not in str(found.value)
    alone = trainer(recipe.model_copy(update={"checkpointing": True, "documents": 1}), tmp_path / "alone")
    alone.train_step = no_memory  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="at documents: 1; start anew with shorter documents or fewer questions;"):
        alone.run()


def test_an_evaluation_without_memory_says_what_it_takes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings than a step's."""
    monkeypatch.setattr("hyperlora.training.score_controls", no_memory)
    with pytest.raises(OutOfMemory, match="lower max_tokens, items or facts of the recipe's evaluation") as found:
        trainer(recipe, tmp_path / "run").run()
    assert "documents" not in str(found.value)


def test_prompts_beyond_the_window_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe.mix, recipe.beside = recipe.mix[:1], Beside(share=1.0)
    base = make_base()
    run = trainer(recipe, tmp_path / "run", base)
    base.model.config.max_position_embeddings = 30
    with pytest.raises(
        InputError, match=r"\d+ tokens of a document and what is asked are beyond the window of tiny-llama, 30"
    ):
        run.train_step()


def test_start_refuses_a_folder_of_something_else(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        start(recipe, tmp_path / "full", "x")


def test_start_from_continues_the_weights_of_a_generator(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperlora.training.load_base", lambda _: make_base())
    first = start(recipe, tmp_path / "first", "first")
    first.generator.save_pretrained(tmp_path / "g")
    settings = {**recipe.model_dump(exclude={"generator"}), "start_from": str(tmp_path / "g"), "steps": 1}
    second = start(Recipe.model_validate(settings), tmp_path / "second", "second")
    for (name, one), two in zip(
        first.generator.state_dict().items(), second.generator.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3, msg=name)  # saved in 16 bits
    before = [p.clone() for p in second.generator.hypernet.parameters()]
    second.train_step()
    assert any(not torch.equal(p, q) for p, q in zip(before, second.generator.hypernet.parameters(), strict=True))


def test_a_run_may_add_to_the_generator_that_it_starts_from_and_train_that_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperlora.training.load_base", lambda _: make_base())
    first = start(recipe, tmp_path / "first", "first").generator
    first.save_pretrained(tmp_path / "g")
    settings = recipe.model_dump(exclude={"generator"}) | {"start_from": str(tmp_path / "g"), "trained": ["salience"]}
    more = Recipe.model_validate(settings | {"generator": {"rank": 5, "options": {"salience": True}}})
    run = start(more, tmp_path / "second", "second")
    options = recipe.generator.options | {"salience": True}
    assert run.generator.config == recipe.generator.model_copy(update={"rank": 5, "options": options})
    before = {name: tensor.clone() for name, tensor in run.generator.state_dict().items()}
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(before[name], tensor, rtol=1e-3, atol=1e-3)
    run.train_step()
    run.save()
    again = start(more, tmp_path / "second", "second")
    moved = {name for name, tensor in again.generator.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"hypernet.salience.weight", "hypernet.salience.bias"}
    assert again.train_step() == run.train_step()
    other = more.model_copy(update={"generator": GeneratorConfig(rank=6, options={"salience": True})})
    with pytest.raises(InputError, match=r"\(generator differ"):
        start(other, tmp_path / "second", "second")
    with pytest.raises(InputError, match="does not fit"):
        Generator.from_pretrained(tmp_path / "g", first.base, GeneratorConfig(options={"pointers": 0}))
    with pytest.raises(InputError, match="named 'saliense'; did you mean 'salience'"):
        start(more.model_copy(update={"trained": ["saliense"]}), tmp_path / "third", "third")


def test_training_on_the_test_documents_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe.evaluation.qa = [str(tmp_path / "qa.jsonl")]
    with pytest.raises(Overlap, match="also stand in the training data"):
        trainer(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("step: 3", "unknown key 'step'; did you mean 'steps'"),
        ("steps: many", "steps: Input should be a valid integer"),
        ("generator: {rnak: 3}", "did you mean 'rank'"),
        ("mix: [{task: facts, fact: [1, 2]}]", "did you mean 'facts'"),
        ("mix: [{task: fcats}]", "mix.0"),
        ("mix: [{task: facts, facts: [8, 2]}]", "must not exceed"),
        ("generator: {layers: []}", "generator.layers"),
        ("mix: []", "mix"),
        ("trained: ['']", "trained.0"),
        ("documents: 1\nbeside: {}", "two or more documents to a step"),
        ("[1, 2]", "not a recipe"),
        ("steps: [", "not valid YAML"),
    ],
)
def test_wrong_recipes_say_what_to_change(tmp_path: Path, change: str, message: str) -> None:
    good = {"steps": "steps: 3", "calibration": "calibration: {sources: [c4]}", "mix": "mix: [{task: facts}]"}
    good[change.split(":")[0]] = change
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(good.values()) if not change.startswith("[") else change)
    with pytest.raises(InputError, match=r"recipe\.yaml") as caught:
        read_recipe(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[1] / "train").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        read_recipe(path)
