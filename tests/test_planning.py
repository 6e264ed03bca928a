"""Plans against what real runs take."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hyperlora import planning
from hyperlora.base_model import BaseModel
from hyperlora.flop_counter import flop_counter
from hyperlora.generator import Generator
from hyperlora.groups import BATCH_TOKENS
from hyperlora.hypernet import HYPERNETS
from hyperlora.live_bytes import LiveBytes
from hyperlora.packing import alike
from hyperlora.recipe import Recipe, Teacher, Unrelated, read_recipe
from hyperlora.training import Trainer

from .conftest import OPTIONS, Run, make_base, make_generator, one_line

ROOT = Path(__file__).parents[1]


def test_live_bytes_are_those_of_storages() -> None:
    """Views and weights do not count; what is freed counts no more; the peak stays."""
    weight = torch.randn(10, 10, requires_grad=True)
    with LiveBytes([weight]) as live:
        weight.T.contiguous()
        assert live.now == 0 and live.peak == 400
        a = torch.zeros(250)
        b = a.view(10, 25)[2:]
        assert live.now == 1000
        del a
        assert live.now == 1000
        del b
        assert live.now == 0
        (weight @ weight).exp().sum().backward()
        assert live.now == 400  # the gradient


@pytest.mark.parametrize("path", sorted((ROOT / "train").rglob("*.yaml")), ids=str)
def test_every_recipe_here_can_be_planned(path: Path) -> None:
    recipe = read_recipe(path)
    loads = planning.read_loads(recipe, 64, 16)
    assert [load.weight for load in loads] == [task.weight for task in recipe.mix]
    assert all(load.document > 0 and load.row > load.labels for load in loads)


@pytest.mark.parametrize(("checkpointing", "at_once"), [(False, 2048), (True, 2048), (False, 64)])
@pytest.mark.parametrize("name", sorted(HYPERNETS))
def test_a_plan_is_what_a_step_takes(
    recipe: Recipe,
    tmp_path: Path,
    tiny_dirs: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    checkpointing: bool,
    at_once: int,
) -> None:
    """The same step with data, on documents and questions of the planned sizes, with all parts of the loss, in one pass
    of the student or in several."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", at_once)
    (tmp_path / "run").mkdir()
    settings = {"hypernet": name, "options": OPTIONS[name], "layers": [1, 3]}
    recipe = recipe.model_copy(
        update={
            "generator": recipe.generator.model_copy(update=settings),
            "documents": 4,
            "micro_batches": 1,
            "checkpointing": checkpointing,
            "unrelated": Unrelated(sources=recipe.calibration.sources, tokens=24),
            "teacher": Teacher(hidden=0.1, hidden_layers=2),
        }
    )
    base = make_base()
    run = Trainer(recipe, make_generator(base, **recipe.generator.model_dump()), tmp_path / "run")
    item, rng = next((item, rng) for item, rng in (run.drawing.mix.draw(0) for _ in range(50)) if item.questions)
    run.drawing.mix.pick = lambda _: (lambda: item, rng)  # type: ignore[method-assign, assignment, return-value]
    rows = run.student.rows(0, item, rng)
    load = planning.Load(
        document=len(run.generator.encoder.tokenize(item.text)),
        questions=len(rows),
        row=max(len(row.ids) for row in rows),
        labels=max(row.labels for row in rows),
        weight=1.0,
        alike=alike([row.ids[: row.start] for row in rows]),
    )
    run.train_step()  # gradients and moments are there from now on
    for parameter in run.generator.hypernet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held = [*base.model.parameters(), *base.model.buffers(), *run.generator.parameters(), *run.generator.buffers()]
    held += [p.grad for p in run.generator.hypernet.parameters() if p.grad is not None]
    gc.collect()
    gc.disable()  # activation checkpointing leaves cycles, which it would free at any time
    try:
        with LiveBytes(held) as live, flop_counter() as counter:
            run.train_step()
        planned = planning.plan(recipe, tiny_dirs[0], 4, [load], torch.float32)
    finally:
        gc.enable()
    assert planned.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert 0.95 * live.peak < planned.working < 1.2 * live.peak
    assert planned.base == sum(4 * p.numel() for p in base.model.parameters()) + sum(
        b.numel() * b.element_size() for b in base.model.buffers()
    )


def test_rows_of_text_are_as_long_as_the_students(recipe: Recipe, tmp_path: Path) -> None:
    text = recipe.mix[2]
    for following in (8, 90):
        recipe.mix = [text.model_copy(update={"tokens": (70, 80), "following": following})]
        run = Trainer(recipe, make_generator(make_base()), tmp_path / "run")
        rows = [row for _ in range(9) for row in run.student.rows(0, *run.drawing.mix.draw(0))]
        (load,) = planning.read_loads(recipe, 64, 16)
        assert load.row == max(len(row.ids) for row in rows)
        assert load.labels == max(row.labels for row in rows)


def test_a_run_that_starts_from_a_generator_is_planned_with_it(
    run: Run, recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str]
) -> None:
    make_generator(make_base(), "perceiver").save_pretrained(tmp_path / "perceiver")
    content = recipe.model_dump(mode="json") | {"base": tiny_dirs[0], "start_from": str(tmp_path / "perceiver")}
    del content["generator"]
    (tmp_path / "next.yaml").write_text(yaml.safe_dump(content))
    code, out, err = run("plan", tmp_path / "next.yaml", "--documents", "1", "--json")
    planned = json.loads(out)
    perceiver = make_generator(make_base(), "perceiver").hypernet
    assert code == 0 and planned["hypernet"] == "perceiver", err
    assert planned["generator"] == planned["trained"] == 4 * sum(p.numel() for p in perceiver.parameters())


def test_what_is_frozen_has_no_gradient(recipe: Recipe, base: BaseModel, tiny_dirs: tuple[str, str]) -> None:
    loads = planning.read_loads(recipe, 16, 8)
    whole = planning.plan(recipe, tiny_dirs[0], 1, loads, torch.float32)
    recipe.trained = ["log_ridge", "aim"]
    some = planning.plan(recipe, tiny_dirs[0], 1, loads, torch.float32)
    hypernet = Generator(base, recipe.generator).hypernet
    assert some.trained == 4 * sum(
        p.numel() for name, p in hypernet.named_parameters() if name.startswith(tuple(recipe.trained))
    )
    assert some.generator == whole.generator == whole.trained
    for stage in (None, 1, 2, 3):
        less, more = planning.memory(some, stage, 2), planning.memory(whole, stage, 2)
        assert less.weights == more.weights
        assert less.gradients / more.gradients == pytest.approx(some.trained / whole.trained, rel=1e-3)
        assert less.optimizer / more.optimizer == pytest.approx(some.trained / whole.trained, rel=1e-3)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "bases").glob("*.json")), ids=lambda path: path.stem)
def test_the_example_bases_can_be_planned(run: Run, path: Path) -> None:
    code, out, err = run("plan", ROOT / "train/one_fact/associative.yaml", "--base", path, "--documents", "1", "--json")
    billions = float(path.stem.removesuffix("b"))
    assert code == 0 and 0.9 < json.loads(out)["base"] / 2e9 / billions < 1.3, err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100}, "recurrent"),
        ({"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 4, "vocab_size": 100}, None),
        ({"model_type": "t5", "d_model": 64, "num_layers": 4}, "t5 is no causal language model"),
    ],
    ids=["mamba", "mpt", "t5"],
)
def test_bases_without_fused_attention_are_planned_or_refused(
    run: Run, recipe_file: Path, tmp_path: Path, fields: dict[str, Any], message: str | None
) -> None:
    (tmp_path / "base.json").write_text(json.dumps(fields))
    code, out, err = run("plan", recipe_file, "--base", tmp_path / "base.json", "--documents", "1", "--json")
    if message is None:
        assert code == 0 and json.loads(out)["base"] > 0, err
    else:
        assert code == 5 and message in one_line(err) and not out


def test_stages_share_out_what_they_say() -> None:
    step = planning.MicroBatch(
        8, "associative", base=1000, generator=400, trained=400, calibration=10, working=500, flops=1.0
    )
    plain, one, two, three = (planning.memory(step, stage, 4, bucket=5) for stage in (None, 1, 2, 3))
    assert plain.total == 1000 + 10 + 400 * 4 + 500 + 400  # gradients are summed in a copy
    assert planning.memory(step, None, 1).total == 1000 + 10 + 400 * 4 + 500
    assert (one.weights, one.gradients, one.optimizer, one.buffers) == (400, 400, 300, 20)
    assert (two.weights, two.gradients, two.optimizer, two.buffers) == (400, 100, 300, 40)
    assert (three.weights, three.gradients, three.optimizer) == (100, 100, 300)
    away = planning.memory(step, 3, 4, bucket=5, offloaded=True)
    assert (away.total, away.host, three.host) == (three.total - 500, 500, 0)


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str]) -> Path:
    """One kind of document; every kind takes a pass of its own."""
    recipe.base, recipe.mix, recipe.beside = tiny_dirs[0], recipe.mix[:1], None
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


def test_plan_prints_a_table_or_json(run: Run, recipe_file: Path) -> None:
    code, out, err = run("plan", recipe_file, "--documents", "1,3", "--tflops", "1")
    assert code == 0 and [line.split()[0] for line in out.splitlines()][-2:] == ["1", "3"], err
    code, out, _ = run("plan", recipe_file, "--documents", "1,3", "--json", "--dtype", "float32")
    one, three = map(json.loads, out.splitlines())
    assert three["step_flops"] == pytest.approx(3 * one["step_flops"], rel=0.1)
    code, out, err = run("plan", recipe_file, "--documents", "1", "--gpus", "7")
    assert code == 0 and "\nmicro_batches 7, a multiple of 7 GPUs (the recipe has 1)\n" in out, err
    assert one["memory"]["3"]["total"] < three["memory"]["3"]["total"]
    assert set(one["memory"]) == {"none", "1", "2", "3", "3_offload"}
    code, out, err = run("plan", recipe_file, "--documents", "1", "--device", "cpu", "--json")
    assert code == 0 and json.loads(out)["base"] == one["base"], err  # in float32
    code, out, _ = run("plan", recipe_file, "--documents", "1", "--gpu-memory", "0.0001")
    assert code == 0 and "*" in out and "the base alone does not fit" in out


def test_a_plan_needs_no_recipe(run: Run, tiny_dirs: tuple[str, str]) -> None:
    code, out, err = run("plan", "--base", tiny_dirs[0], "--gpus", "2", "--documents", "1,2", "--json")
    assert code == 0, err
    for count, line in enumerate(out.splitlines(), 1):
        planned = json.loads(line)
        assert (planned["documents"], planned["step_flops"]) == (count, planned["flops"])  # one micro-batch for each
    code, out, err = run("plan", "--base", tiny_dirs[0], "--gpus", "2", "--micro-batches", "3")
    assert code != 0 and "give a multiple of 2" in one_line(err) and not out


def test_a_base_may_be_nothing_but_a_config(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    (tmp_path / "big.json").write_text(json.dumps(config | {"num_attention_heads": 4, "vocab_size": 100}))
    code, out, err = run("plan", recipe_file, "--base", tmp_path / "big.json", "--documents", "1", "--json")
    layer = 4 * 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert code == 0 and json.loads(out)["base"] == 2 * (2 * 100 * 64 + 4 * layer + 64) + 2 * 8 * 4, (
        err
    )  # two tables of frequencies


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--documents", "2,x"], "give numbers with commas"),
        (["--documents", "0"], "give numbers with commas"),
        (["--gpus", "7", "--micro-batches", "4"], "give a multiple of 7"),
        (["--base", "nowhere.json"], "no config of a base model at nowhere.json"),
        (["--dtype", "float7"], "unknown dtype"),
        (["--device", "tpu"], "plans are for cuda or cpu"),
    ],
)
def test_plans_that_cannot_be_made(run: Run, recipe_file: Path, arguments: list[str], message: str) -> None:
    code, out, err = run("plan", recipe_file, *arguments)
    assert code != 0 and message in one_line(err) and not out


def test_a_config_of_no_model(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    for text in ("{", "{}", '{"model_type": "lama"}', "[]"):
        (tmp_path / "bad.json").write_text(text)
        code, _, err = run("plan", recipe_file, "--base", tmp_path / "bad.json")
        assert code != 0 and "no config of a base model" in one_line(err), text


def test_long_documents_are_planned_in_chunks(recipe: Recipe, tiny_dirs: tuple[str, str]) -> None:
    """The patches of several chunks cost as many operations more, and their memory does not add up."""
    recipe.generator = recipe.generator.model_copy(update={"chunk_tokens": 32})
    loads = [[planning.Load(n, 1, 24, 8, 1.0)] for n in (32, 128)]
    short, long = (planning.plan(recipe, tiny_dirs[0], 1, load, torch.float32) for load in loads)
    assert long.flops > 1.2 * short.flops
    assert long.working < 4 * short.working


def test_a_gpu_reads_more_documents_at_a_time(recipe: Recipe, tiny_dirs: tuple[str, str]) -> None:
    load = planning.Load(document=128, questions=1, row=24, labels=8, weight=1.0)
    recipe.beside = None
    arguments = (recipe, tiny_dirs[0], 40, [load], torch.float32)
    cpu, gpu = (planning.plan(*arguments, device=device) for device in ("cpu", "cuda"))
    assert gpu.working > 1.02 * cpu.working
    assert gpu.flops == pytest.approx(cpu.flops, rel=0.01)
