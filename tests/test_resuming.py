"""A run goes on from its own checkpoint, and from no other."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from hyperlora.data.sources import load
from hyperlora.data.teacher import teach
from hyperlora.errors import InputError
from hyperlora.recipe import Recipe

from .conftest import losses, make_base
from .test_training import each_hypernet, of, trainer


@each_hypernet
def test_interrupted_and_resumed_equals_uninterrupted(recipe: Recipe, tmp_path: Path, name: str) -> None:
    recipe = of(recipe, name)
    trainer(recipe, tmp_path / "whole").run()
    interrupted = trainer(recipe, tmp_path / "parts")

    def interrupt(record: dict[str, object]) -> None:
        if record.get("step") == 4 and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted.run(interrupt)
    resumed = trainer(recipe, tmp_path / "parts")
    assert resumed.resume() and resumed.step == 4
    resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = ((tmp_path / n / "generator" / "model.safetensors").read_bytes() for n in ("whole", "parts"))
    assert whole == parts


def test_base_is_never_trained_and_other_recipes_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    base = make_base()
    before = base.fingerprint
    trainer(recipe, tmp_path / "run", base).run()
    del base.fingerprint
    assert base.fingerprint == before
    for key, value in (("weight_decay", 1.0), ("documents", 2)):
        with pytest.raises(InputError, match=f"{key} differ"):
            trainer(recipe.model_copy(update={key: value}), tmp_path / "run").resume()


def test_what_errors_advise_can_be_done(recipe: Recipe, tmp_path: Path) -> None:
    """A run goes on at another learning rate, and in smaller micro-batches, which change nothing else."""
    whole = trainer(recipe, tmp_path / "whole")
    whole.run()
    stopped = trainer(recipe, tmp_path / "run")
    for _ in range(2):
        stopped.log.write({"step": stopped.step + 1, **stopped.train_step()})
    stopped.save()
    split = trainer(recipe.model_copy(update={"documents": 1, "micro_batches": 3}), tmp_path / "run")
    assert split.resume() and split.step == 2
    split.run()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    stopped.save()
    slower = trainer(recipe.model_copy(update={"learning_rate": recipe.learning_rate / 9}), tmp_path / "run")
    assert slower.resume() and slower.rates[0] == recipe.learning_rate / 9


def test_a_run_of_a_version_that_knew_less_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    recipe.unrelated.in_prompt, recipe.beside = 0.0, None  # type: ignore[union-attr]
    trainer(recipe, tmp_path / "run").save()
    path = tmp_path / "run" / "checkpoint" / "position.json"
    position = json.loads(path.read_text())
    del position["recipe"]["unrelated"]["in_prompt"], position["recipe"]["beside"]
    path.write_text(json.dumps(position))
    assert trainer(recipe, tmp_path / "run").resume()
    position["recipe"]["unrelated"]["elsewhere"] = 1
    path.write_text(json.dumps(position))
    with pytest.raises(InputError, match="this version cannot read"):
        trainer(recipe, tmp_path / "run").resume()


def test_strengths_may_learn_more_slowly_from_now_on(recipe: Recipe, tmp_path: Path) -> None:
    trainer(recipe, tmp_path / "plain").save()
    recipe.strength_rate = 1e-2
    trainer(recipe, tmp_path / "run").save()
    slower = recipe.model_copy(update={"strength_rate": 1e-3, "learning_rate": 1e-4})
    assert trainer(slower, tmp_path / "run").resume()
    with pytest.raises(InputError, match="strength_rate differ"):
        trainer(recipe, tmp_path / "plain").resume()


def test_a_run_goes_on_in_another_precision_of_the_base(recipe: Recipe, tmp_path: Path) -> None:
    base = make_base()
    base.model.half()
    assert base.fingerprint.weights is None
    trainer(recipe, tmp_path / "run").save()
    assert trainer(recipe, tmp_path / "run", base).resume()


def test_a_run_goes_on_with_its_own_base_only(recipe: Recipe, tmp_path: Path) -> None:
    trainer(recipe, tmp_path / "run").save()
    with pytest.raises(InputError, match="another base"):
        trainer(recipe, tmp_path / "run", make_base(seed=5)).resume()


def test_a_base_may_be_called_otherwise(recipe: Recipe, tmp_path: Path) -> None:
    trainer(recipe, tmp_path / "run").save()
    assert trainer(recipe.model_copy(update={"base": "tiny, elsewhere"}), tmp_path / "run").resume()


def test_documents_and_replies_that_have_changed_are_noticed(recipe: Recipe, tmp_path: Path) -> None:
    replies, base = tmp_path / "replies", make_base()
    asked = load(str(tmp_path / "qa.jsonl"))
    teach(base, asked, replies, top_k=4, max_new_tokens=4)
    recipe.teacher.corpora = [str(replies)]
    trainer(recipe, tmp_path / "run").save()
    assert trainer(recipe, tmp_path / "run").resume()
    shutil.rmtree(replies)
    teach(base, asked, replies, top_k=5, max_new_tokens=4)
    with pytest.raises(InputError, match="other replies of a teacher"):
        trainer(recipe, tmp_path / "run").resume()
    shutil.rmtree(replies)
    teach(base, asked, replies, top_k=4, max_new_tokens=4)
    assert trainer(recipe, tmp_path / "run").resume()
    lines = (tmp_path / "qa.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "qa.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match="other documents"):
        trainer(recipe, tmp_path / "run").resume()
