import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hyperlora import checkpoint
from hyperlora.adapter_training import Adapter, _packed, _surprise, held_out, train_adapter, validation_loss
from hyperlora.base_model import BaseModel
from hyperlora.checkpoint import find, load
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.generator import Generator
from hyperlora.generator_config import GeneratorConfig
from hyperlora.groups import BATCH_TOKENS
from hyperlora.inject import inject
from hyperlora.memory import Memory
from hyperlora.methods import METHODS, Document
from hyperlora.objectives import Row, collate, cross_entropy
from hyperlora.recipe import Recipe
from hyperlora.runtime import Runtime

from .conftest import TEXT

WORDS = ("red", "blue", "green", "grey")


@pytest.fixture
def asking(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A recipe whose questions are about documents in a file, some of them held out."""
    rows = [
        {
            "id": f"d{number}",
            "context": f"The door of house {number} is {WORDS[number % 4]}.",
            "qas": [{"id": "q", "question": "Which colour is the door?", "answers": [WORDS[number % 4]]}],
        }
        for number in range(80)
    ]
    path = tmp_path / "doors.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = recipe.model_dump() | {
        "mix": [{"task": "qa", "sources": [str(path)], "max_tokens": 400}],
        "steps": 12,
        "documents": 4,
        "save_every": 4,
        "warmup": 2,
        "unrelated": None,
        "generator": {**recipe.generator.model_dump(), "modules": ["down_proj"]},
    }
    return Recipe.model_validate(content)


def adapters(folder: Path) -> bytes:
    return (folder / "adapter" / "shared.safetensors").read_bytes()


def test_the_best_of_several_rates_is_kept(asking: Recipe, base: BaseModel, tmp_path: Path) -> None:
    asking.steps = 24
    untrained = validation_loss(asking, base, Adapter(base, asking))
    losses = train_adapter(asking, base, [1e-6, 1e-2], tmp_path / "run")
    assert losses["0.01"] < 0.9 * untrained < losses["1e-06"]
    assert json.loads((tmp_path / "run" / "sweep.json").read_text()) == losses
    asking.steps = 28  # both rates go on, not the best alone
    longer = train_adapter(asking, base, [1e-6, 1e-2], tmp_path / "run")
    assert longer["1e-06"] != losses["1e-06"] and longer["0.01"] != losses["0.01"]
    kind = METHODS["adapted_full"]
    method = kind(base, kind.Settings(path=str(tmp_path / "run" / "adapter")))
    runtime = Runtime(base)
    ask = [runtime.question(0, "Which colour is the door?", "grey")]
    document = Document("x", "The door of house 3 is grey.")
    adapted = runtime.log_likelihood(method.compile([document]), ask)[0].mean()
    full = runtime.log_likelihood(METHODS["full"](base, None).compile([document]), ask)[0].mean()
    assert adapted > full + 0.1
    assert runtime.log_likelihood([Memory()], ask)[0].mean() < adapted


def test_it_is_as_large_as_a_patch(recipe: Recipe, base: BaseModel, tmp_path: Path) -> None:
    """The modules and ranks of a generator's patch, those that it changes for all documents alike too."""
    generator = Generator(base, recipe.generator, "x")
    generator.save_pretrained(tmp_path / "x")
    patch = generator.generate(TEXT)
    for asked in (
        recipe,
        recipe.model_copy(update={"generator": GeneratorConfig(), "start_from": str(tmp_path / "x")}),
    ):
        made = Adapter(base, asked).factors()
        assert {path: (a[0].shape, b[0].shape) for path, (a, b) in made.items()} == {
            path: (a.shape, b.shape) for path, (a, b) in patch.factors.items()
        }


def test_packed_questions_are_those_of_prompts_of_their_own(asking: Recipe, base: BaseModel) -> None:
    """However many, and of one document or of several."""
    adapter = Adapter(base, asking)
    for b in adapter.b:
        torch.nn.init.normal_(b, std=0.3)
    asked = Question("Which?", "grey", ("grey",)), Question("Which colour is it?", "a red", ("red",))
    items = [Item("a", TEXT, asked), Item("b", "The door is blue.", asked[:1]), Item("c", TEXT[::-1], (asked[0],) * 2)]
    found = _surprise(base, adapter, [_packed(base, item) for item in items]).item()
    total = 0.0
    for item in items:
        for question in item.questions:
            prompt = base.prompt.prompt_ids(base.tokenizer, question.text, item.text)
            row = Row(0, prompt + base.prompt.answer_ids(base.tokenizer, question.reply), len(prompt))
            with inject(base.model, adapter.factors()):
                total += cross_entropy(base.model, collate([row], base.device)).item()
    assert found == pytest.approx(total, rel=1e-5)


def test_questions_in_several_batches_train_alike(
    asking: Recipe, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [train_adapter(asking, base, [1e-2], tmp_path / "whole")["adapter"]]
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 1)  # each by itself
    losses.append(train_adapter(asking, base, [1e-2], tmp_path / "parts")["adapter"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_a_killed_run_goes_on_to_the_same_adapter(
    asking: Recipe, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_adapter(asking, base, [1e-3, 1e-2], tmp_path / "whole", sweep_steps=5)
    save, left = checkpoint.replace, [2]

    def dying(run: Path, write: Any) -> None:
        save(run, write)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "replace", dying)
    for saves in (1, 1, 3):
        left[0] = saves
        with pytest.raises(KeyboardInterrupt):
            train_adapter(asking, base, [1e-3, 1e-2], tmp_path / "parts", sweep_steps=5)
    monkeypatch.setattr(checkpoint, "replace", save)
    train_adapter(asking, base, [1e-3, 1e-2], tmp_path / "parts", sweep_steps=5)
    assert adapters(tmp_path / "parts") == adapters(tmp_path / "whole")
    for name, step in (("0.001", 5), ("0.01", 12)):  # only the better one is trained to the end
        found = find(tmp_path / "parts" / f"rate-{name}")
        assert found is not None and load(found).position["step"] == step


def test_held_out_documents_are_never_trained_on(
    asking: Recipe, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hyperlora.adapter_training as module

    seen: list[Item] = []
    packed = module._packed
    monkeypatch.setattr(module, "_packed", lambda b, item: seen.append(item) or packed(b, item))
    monkeypatch.setattr(module, "validation_loss", lambda *_: 0.0)
    train_adapter(asking, base, [1e-3], tmp_path / "run")
    assert len(seen) > 30 and not any(held_out(item) for item in seen)
    assert any(held_out(Item(f"d{number}", "")) for number in range(80))


def test_bad_runs_are_refused(asking: Recipe, recipe: Recipe, base: BaseModel, tmp_path: Path) -> None:
    train_adapter(asking, base, [1e-3], tmp_path / "run")
    before = adapters(tmp_path / "run")
    with pytest.raises(InputError, match="another recipe"):
        train_adapter(asking.model_copy(update={"documents": 3}), base, [1e-3], tmp_path / "run")
    assert adapters(tmp_path / "run") == before
    facts = recipe.model_copy(update={"mix": recipe.mix[:1], "steps": 1})
    with pytest.raises(InputError, match="-1 is no learning rate"):
        train_adapter(asking, base, [1e-3, -1], tmp_path / "other")
    with pytest.raises(InputError, match="add a qa task"):
        train_adapter(facts, base, [1e-3], tmp_path / "other")


def test_the_script_takes_other_sizes_than_the_recipe(
    asking: Recipe, tiny_dirs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("script", Path(__file__).parents[1] / "train/adapted_full.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "asking.yaml"
    path.write_text(yaml.safe_dump(asking.model_dump(mode="json")))
    run = tmp_path / "run"
    script.main(path, run, rates="1e-2", base=tiny_dirs[0], steps=3, documents=2, dtype="bfloat16")
    assert "adapter: " in capsys.readouterr().out and (run / "adapter" / "shared.safetensors").exists()
    found = find(run / "rate-0.01")
    assert found is not None
    position = load(found).position
    assert position["step"] == 3 and position["settings"]["documents"] == 2
    with pytest.raises(InputError, match="unknown dtype"):
        script.main(path, run, dtype="bfloat61")
