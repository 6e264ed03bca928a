"""DeepSpeed in real processes on the CPU: the losses of one process, exact resume, other numbers of processes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hyperlora import zero
from hyperlora.errors import InputError
from hyperlora.hypernet import HYPERNETS
from hyperlora.recipe import Recipe, TextTask
from hyperlora.run_log import RunLog
from hyperlora.training import start

from .conftest import OPTIONS, losses

pytest.importorskip("deepspeed")
psutil = pytest.importorskip("psutil")
CONFIGS = Path(__file__).parents[1] / "ds_configs"


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str]) -> Path:
    """Two micro-batches, which two processes share out; with activation checkpointing, which `recipe` is without."""
    recipe.base, recipe.micro_batches, recipe.documents, recipe.strength_rate = tiny_dirs[0], 2, 2, 1e-2
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe.model_copy(update={"checkpointing": True}).model_dump(mode="json")))
    return path


def launch(processes: int, *arguments: object, launcher: str = "torchrun") -> subprocess.Popen[str]:
    if launcher == "torchrun":
        begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        begin += ["-m", "hyperlora", "train"]
    else:
        begin = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(processes)]
        begin += [str(CONFIGS.parent / "train" / "generator.py")]
    command = [*begin, *map(str, arguments), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def norms(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["gradient_norm"] for record in records if "loss" in record]


def seconds(folder: Path) -> list[float]:
    """Of every step whose line is whole."""
    whole, _, _ = (folder / "metrics.jsonl").read_text().rpartition("\n")
    records = [json.loads(line) for line in whole.splitlines()]
    return [record["seconds"] for record in records if "loss" in record]


def after(step: int, folder: Path, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step}, "loss"' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)


def killed_after(step: int, folder: Path, process: subprocess.Popen[str], one: bool) -> None:
    """All of its processes at once, or one of them, which the others do not outlive."""
    after(step, folder, process)
    if one:
        psutil.Process(process.pid).children()[1].kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process_does(recipe: Recipe, recipe_file: Path, tmp_path: Path, stage: int) -> None:
    """Two processes; killed and resumed; resumed by one process from the universal checkpoint. Gradients are cut."""
    recipe.clip = 0.01
    recipe_file.write_text(yaml.safe_dump(yaml.safe_load(recipe_file.read_text()) | {"clip": recipe.clip}))
    start(recipe, tmp_path / "one", "tiny").run()
    settings = ["--deepspeed", CONFIGS / f"zero{stage}.json"]
    out = finished(launch(2, recipe_file, "-o", tmp_path / "two", *settings))
    assert out.splitlines() == [str(tmp_path / "two" / "generator")]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    # Adam hides a factor in the gradients, the norm does not; and clipping acts.
    assert norms(tmp_path / "two") == pytest.approx(norms(tmp_path / "one"), rel=1e-3)
    assert max(norms(tmp_path / "one")) > recipe.clip
    one, two = (load_file(tmp_path / name / "generator" / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)  # the hypernetwork and its calibration, nothing of the base
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-2, atol=2e-3, msg=name)  # in 16 bits

    run = tmp_path / "run"
    killed_after(4, run, launch(2, recipe_file, "-o", run, *settings), one=stage != 1)
    alone, before = tmp_path / "all alone", seconds(run)
    reached = json.loads((run / "checkpoint" / "position.json").read_text())["step"]
    shutil.copytree(run, alone)
    finished(launch(2, recipe_file, "-o", run, *settings))
    assert losses(run) == losses(tmp_path / "two")
    assert reached and seconds(run)[:reached] == before[:reached]  # it went on, and did not begin again

    refused = launch(1, recipe_file, "-o", alone, *settings)
    _, err = refused.communicate()
    assert refused.returncode != 0
    convert(err)
    finished(launch(1, recipe_file, "-o", alone, *settings))
    assert losses(alone) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_more_processes_at_another_stage_go_on_from_the_universal_checkpoint(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    start(recipe, tmp_path / "one", "tiny").run()
    run, settings = tmp_path / "run", {n: ["--deepspeed", CONFIGS / f"zero{n}.json"] for n in (1, 2, 3)}
    killed_after(4, run, launch(1, recipe_file, "-o", run, *settings[1]), one=False)
    for stage in (2, 3):
        refused = launch(2, recipe_file, "-o", run, *settings[stage])
        _, err = refused.communicate()
        assert refused.returncode != 0
        if stage == 3:
            assert "converts nothing between stage 3 and the others; go on at stage 1" in err
        else:
            convert(err)
    finished(launch(2, recipe_file, "-o", run, *settings[2]))
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def convert(err: str) -> None:
    """Run the command that an error names."""
    command = next(line for line in err.splitlines() if "hyperlora: error:" in line).split("convert it with: ")[1]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)


@pytest.mark.parametrize("name", [name for name in HYPERNETS if name != "associative"])
def test_sharded_weights_serve_every_architecture(recipe: Recipe, recipe_file: Path, tmp_path: Path, name: str) -> None:
    """Some processes read their documents in fewer batches than others."""
    recipe.generator = recipe.generator.model_copy(update={"hypernet": name, "options": OPTIONS[name]})
    recipe_file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    start(recipe, tmp_path / "one", "tiny").run()
    finished(launch(2, recipe_file, "-o", tmp_path / "two", "--deepspeed", CONFIGS / "zero3.json"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize("name", HYPERNETS)
def test_processes_that_read_more_do_not_leave_the_others_behind(
    recipe: Recipe, recipe_file: Path, tmp_path: Path, name: str
) -> None:
    """Documents of different ranks and numbers of chunks, with weights that all processes must gather at the same
    time."""
    update = {"chunk_tokens": 24, "hypernet": name, "options": OPTIONS[name]}
    update |= {"rank": 4, "rank_tokens": 12, "max_rank": 8}
    recipe.generator = recipe.generator.model_copy(update=update)
    for task in recipe.mix:
        if isinstance(task, TextTask):
            task.tokens = (4, 90)
    recipe_file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    run = start(recipe, tmp_path / "one", "tiny")
    calls: list[int] = []
    counted = run.generator.calls
    run.generator.calls = lambda documents: calls.append(counted(documents)) or calls[-1]  # type: ignore[method-assign, func-returns-value]
    run.run()
    steps = list(zip(calls[::2], calls[1::2], strict=True))
    assert any(one != other for one, other in steps)
    finished(launch(2, recipe_file, "-o", tmp_path / "two", "--deepspeed", CONFIGS / "zero3.json"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_weights_in_the_cpus_memory_train_as_one_process_does(
    recipe: Recipe, recipe_file: Path, tmp_path: Path
) -> None:
    start(recipe, tmp_path / "one", "tiny").run()
    finished(launch(2, recipe_file, "-o", tmp_path / "two", "--deepspeed", CONFIGS / "zero3_offload.json"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_torchrun_alone_trains_as_one_process_does(recipe: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    """And scores as one, of which each process asks for a part."""
    start(recipe, tmp_path / "one", "tiny").run()
    finished(launch(2, recipe_file, "-o", tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (RunLog(tmp_path / name).summary()["evaluation"]["facts-2"] for name in ("one", "two"))
    assert two == pytest.approx(one) and "beside_f1" in one


def test_deepspeeds_launcher_starts_the_script(recipe: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    """With two micro-batches to a process."""
    recipe.documents, recipe.micro_batches = 1, 4
    recipe_file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    start(recipe, tmp_path / "one", "tiny").run()
    settings = ["--deepspeed", CONFIGS / "zero1.json"]
    finished(launch(2, recipe_file, "-o", tmp_path / "two", *settings, launcher="deepspeed"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_base_in_16_bits_trains_as_in_one_process(recipe: Recipe, recipe_file: Path, tmp_path: Path) -> None:
    start(recipe, tmp_path / "one", "tiny", dtype=torch.bfloat16).run()
    settings = ["--deepspeed", CONFIGS / "zero2.json", "--dtype", "bfloat16"]
    finished(launch(2, recipe_file, "-o", tmp_path / "two", *settings))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)  # three digits to a number


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ctrl_c_saves_under_a_launcher(recipe: Recipe, recipe_file: Path, tmp_path: Path, launcher: str) -> None:
    """A terminal interrupts the launcher and its processes, and the launcher ends the processes once more."""
    content = yaml.safe_load(recipe_file.read_text()) | {"steps": 400, "save_every": 400}
    recipe_file.write_text(yaml.safe_dump(content))
    folder, settings = tmp_path / "run", ["--deepspeed", CONFIGS / "zero1.json"] * (launcher == "deepspeed")
    process = launch(2, recipe_file, "-o", folder, *settings, launcher=launcher)
    after(4, folder, process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    reached = json.loads((folder / "checkpoint" / "position.json").read_text())["step"]
    assert 4 <= reached < 400 and len(losses(folder)) == reached


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    recipe: Recipe, recipe_file: Path, tmp_path: Path, processes: int
) -> None:
    """Also when only one of two processes meets it: its error ends the other, which waits for it."""
    recipe_file.write_text(yaml.safe_dump(yaml.safe_load(recipe_file.read_text()) | {"steps": 60, "save_every": 30}))
    folder = tmp_path / "run"
    process = launch(processes, recipe_file, "-o", folder, "--deepspeed", CONFIGS / "zero1.json")
    after(4, folder, process)
    last = psutil.Process(process.pid).children()[-1]
    last.rlimit(psutil.RLIMIT_FSIZE, (60_000 // processes, 60_000 // processes))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in err.split("hyperlora: error:")[0], err[-3000:]
    assert f"cannot write {folder / 'checkpoint'}: the disk is full" in err
    assert json.loads((folder / "checkpoint" / "position.json").read_text())["step"] == 0
    if processes == 1:  # of several the first may be killed while it waits, and the next run sweeps up
        assert not (folder / "checkpoint.partial").exists()


def test_contradictions_and_foreign_checkpoints_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for settings, message in (
        ({"train_batch_size": 99}, "train_batch_size is 99, the recipe says 3"),
        ({"gradient_clipping": 9}, "gradient_clipping is 9, the recipe says 1.0"),
        ({"optimizer": {"type": "Adam"}}, "optimizer contradicts the recipe"),
        ({"bf16": {"enabled": True}}, "--dtype bfloat16"),
        ({"prescale_gradients": True}, "prescale_gradients contradicts the recipe"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types contradicts the recipe"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "zero_quantized_gradients contradicts"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op contradicts the recipe"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation has no effect here; did you mean zero_optimization"),
        ({"sparse_attention": {}}, "sparse_attention has no effect here; leave it out"),
        ({"learning_rate": 1e-4}, "use the recipe's learning_rate"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "use the recipe's checkpointing"),
        ({"checkpoint": True}, "checkpoint is True; give its settings"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage 3 alone shares out"),
        ({"communication_data_type": "fp16"}, "communication_data_type contradicts the recipe"),
        ({"checkpoint": {"load_universal": True}}, "load_universal is set when it is needed"),
        ({"zero_optimization": {"stage": 7}}, "a stage of 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "leave out --deepspeed"),
        ({"zero_optimization": True}, "a stage of 1, 2 or 3"),
        ({"train_batch_size": 3}, "a stage of 1, 2 or 3"),
        ([], "needs a JSON object"),
    ):
        path.write_text(json.dumps(settings))
        with pytest.raises(InputError, match=message):
            zero.read_settings(path, recipe)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot read the DeepSpeed settings"):
        zero.read_settings(path, recipe)
    path.write_text(json.dumps({"bf16": {"enabled": False}, "train_batch_size": 3, "zero_optimization": {"stage": 1}}))
    assert zero.read_settings(path, recipe)["gradient_clipping"] == recipe.clip


@pytest.mark.parametrize(
    "wrong", [{"reduce_bucket_size": "much"}, {"compute_grad_norm": False}, {"mics_shard_size": 2}], ids=str
)
def test_what_deepspeed_refuses_is_one_line(recipe_file: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, **wrong}}))
    refused = launch(1, recipe_file, "-o", tmp_path / "run", "--deepspeed", path)
    _, err = refused.communicate(timeout=120)
    assert refused.returncode != 0 and "hyperlora: error: DeepSpeed refuses its settings: " in err, err[-3000:]


def test_shipped_settings_are_valid(recipe: Recipe) -> None:
    found = {path.stem: zero.read_settings(path, recipe) for path in sorted(CONFIGS.glob("*.json"))}
    assert {name: settings["zero_optimization"]["stage"] for name, settings in found.items()} == {
        "zero1": 1,
        "zero2": 2,
        "zero3": 3,
        "zero3_offload": 3,
    }


_STEPS = """
import json, math, sys
import torch
from hyperlora import zero
linear = torch.nn.functional.linear
zero.join("cpu")
for stage in (1, 2, 3):
    module = torch.nn.Linear(8, 8)
    settings = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": 1,
        "gradient_clipping": 1.0, "zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False,
    }
    engine = zero.ZeroEngine(module, torch.optim.AdamW(module.parameters()), settings)
    assert engine.engine.zero_reduce_bucket_size() == 72
    seen = []
    for factor in (1.0, math.nan, 1.0):
        engine.backward(engine.call(torch.ones(1, 8)).square().sum() * factor, last=True)
        norm = engine.step([0.1])
        with engine.whole():
            seen.append((norm, module.weight.detach().clone()))
    (_, before), (norm, after), (later, moved) = seen
    assert norm == math.inf and torch.equal(before, after), (stage, norm)
    assert 0 < later < math.inf and not torch.equal(after, moved), (stage, later)
    assert torch.nn.functional.linear is linear, stage
"""


def test_a_gradient_that_is_not_finite_changes_nothing_at_any_stage() -> None:
    """And the buffers that gradients are summed in are no larger than the module, and torch's functions stay."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", _STEPS], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_damaged_optimizer_state_is_one_line(recipe_file: Path, tmp_path: Path) -> None:
    """Cut short; and converted by a command that was killed."""
    run, settings = tmp_path / "run", ["--deepspeed", CONFIGS / "zero1.json"]
    killed_after(4, run, launch(1, recipe_file, "-o", run, *settings), one=False)
    (run / "checkpoint" / "universal" / "tmp").mkdir(parents=True)
    _, err = launch(2, recipe_file, "-o", run, *settings).communicate(timeout=120)
    assert "convert it with: python -m deepspeed" in err and "first remove" in err, err[-3000:]
    states = next((run / "checkpoint" / "zero").glob("*optim_states.pt"))
    states.write_bytes(states.read_bytes()[: states.stat().st_size // 2])
    refused = launch(1, recipe_file, "-o", run, *settings)
    _, err = refused.communicate(timeout=120)
    assert refused.returncode != 0 and "Traceback" not in err.split("hyperlora: error:")[0], err[-3000:]
    assert f"hyperlora: error: the optimizer state in {run / 'checkpoint' / 'zero'} is damaged" in err, err[-3000:]


def test_deepspeed_chooses_among_gpus() -> None:
    with pytest.raises(InputError, match="a GPU of its own; leave --device out"):
        zero.join("cuda:1")


def test_micro_batches_must_fit_the_processes(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("micro_batches: 2", "micro_batches: 3"))
    refused = launch(2, recipe_file, "-o", tmp_path / "other")
    _, err = refused.communicate()
    assert refused.returncode != 0 and "micro_batches is 3, which 2 processes cannot share out" in err
    assert not (tmp_path / "other").exists()
