"""The engine on DeepSpeed's ZeRO (extra `train`): optimizer state, gradients and weights shared out over processes."""

import errno
import json
import logging
import math
import os
import pickle
import socket
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any

from pydantic import ValidationError
from torch import Tensor, autograd, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from hyperlora import ranks
from hyperlora.checkpoint import read_position
from hyperlora.engine import Engine, set_rates
from hyperlora.errors import InputError
from hyperlora.recipe import Recipe

_SHARDS, _UNIVERSAL = "zero", "universal"
BUCKET = 500_000_000  # numbers; DeepSpeed's default for `reduce_bucket_size`
_REFUSALS = (ValidationError, ValueError, AssertionError, TypeError, AttributeError, KeyError)
# What has an effect here. DeepSpeed passes over keys that it does not know, and over those of features that need to be
# called upon.
_KEYS = (
    *("zero_optimization", "zero_allow_untested_optimizer", "train_batch_size", "train_micro_batch_size_per_gpu"),
    *("gradient_accumulation_steps", "gradient_clipping", "steps_per_print", "wall_clock_breakdown"),
    *("memory_breakdown", "checkpoint", "compile", "comms_logger", "flops_profiler", "csv_monitor", "tensorboard"),
    *("wandb", "comet", "monitor_config", "aio", "disable_allgather", "dump_state", "nebula", "autotuning"),
)
_NOT_MEANT = (
    ("communication_data_type", "nothing: gradients are summed in float32"),
    ("compression_training", "nothing: the hypernetwork is trained as it is"),
    ("elasticity", "another number of processes and the universal checkpoint"),
    ("optimizer", "the recipe's learning_rate and weight_decay"),
    ("scheduler", "the recipe's warmup and steps"),
    ("learning_rate", "the recipe's learning_rate"),
    ("activation_checkpointing", "the recipe's checkpointing"),
    ("curriculum_learning", "from_step and to_step of the recipe's tasks"),
    ("data_efficiency", "from_step and to_step of the recipe's tasks"),
    ("bf16", "--dtype bfloat16, which is for the base; what is trained stays in float32"),
    ("fp16", "--dtype bfloat16, which is for the base; what is trained stays in float32"),
    ("amp", "--dtype bfloat16, which is for the base; what is trained stays in float32"),
    ("torch_autocast", "--dtype bfloat16, which is for the base; what is trained stays in float32"),
    ("data_types", "nothing: gradients are summed in float32"),
    ("prescale_gradients", "nothing: losses are divided by the labels of all processes"),
    ("gradient_predivide_factor", "nothing: losses are divided by the labels of all processes"),
    ("gradient_allreduce_op", "nothing: losses are divided by the labels of all processes"),
)


class ZeroEngine(Engine):
    """ZeRO stages 1 to 3 (Rajbhandari et al. 2020, arXiv 1910.02054) over the trained module.

    Its checkpoints are DeepSpeed's own (they hold pickles). Those of another number of processes, or of stage 1 at
    stage 2 and the other way round, are read after they were converted to DeepSpeed's universal checkpoint.

    Args:
        settings: of DeepSpeed, already made to agree with the recipe.
        resumed: the checkpoint that will be loaded, if there is one.

    Raises:
        InputError: DeepSpeed is not installed, or the checkpoint has another layout and was not converted.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, settings: dict[str, Any], resumed: Path | None = None):
        deepspeed = _import()
        stage = settings["zero_optimization"]["stage"]
        self.layout = {"engine": "deepspeed", "stage": stage, "processes": ranks.count()}
        self.tag = _SHARDS if resumed is None else self._tag(resumed)
        numbers = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        # Gradients are summed in a buffer of this size, all of which is allocated: by default 2 GB or more. DeepSpeed's
        # linear would stand in for torch's everywhere, in the base too, and keep the inputs of layers that are frozen.
        sharding = {"reduce_bucket_size": min(BUCKET, numbers), "memory_efficient_linear": False}
        sharding |= settings["zero_optimization"]
        settings = settings | {"zero_optimization": sharding}
        if self.tag == _UNIVERSAL:
            settings = settings | {"checkpoint": {**settings.get("checkpoint", {}), "load_universal": True}}
        with redirect_stdout(sys.stderr):  # stdout is for results
            try:
                self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
            except (*_REFUSALS, deepspeed.DeepSpeedConfigError) as error:
                why = str(error).strip() or type(error).__name__
                if isinstance(error, ValidationError):
                    first = error.errors()[0]
                    why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                raise InputError(f"DeepSpeed refuses its settings: {why.splitlines()[0]}; correct them") from error
        self.module, self.optimizer, self.stage = module, optimizer, stage
        self.gather = deepspeed.zero.GatheredParameters

    def _tag(self, checkpoint: Path) -> str:
        found = read_position(checkpoint).get("layout", {"engine": "plain"})
        if found["engine"] != "deepspeed":
            raise InputError(f"{checkpoint} was written without DeepSpeed; go on without --deepspeed")
        if found == self.layout:
            return _SHARDS
        if 3 in (stages := {found["stage"], self.layout["stage"]}) and len(stages) > 1:
            raise InputError(
                f"{checkpoint} was written at ZeRO stage {found['stage']}, and DeepSpeed converts nothing between "
                f"stage 3 and the others; go on at stage {found['stage']}"
            )
        if (checkpoint / "latest_universal").exists():  # the converter writes it last
            return _UNIVERSAL
        half = f"; first remove {checkpoint / _UNIVERSAL}, which is not whole" * (checkpoint / _UNIVERSAL).exists()
        what = f"{found['processes']} process(es) at ZeRO stage {found['stage']}"
        raise InputError(
            f"the optimizer state in {checkpoint} is of {what}, this run has {self.layout['processes']} at stage "
            f"{self.layout['stage']}; convert it with: python -m deepspeed.checkpoint.ds_to_universal "
            f"--input_folder {quote(str(checkpoint / _SHARDS))} --output_folder {quote(str(checkpoint / _UNIVERSAL))}"
            f"{half}"
        )

    def call(self, *arguments: Any) -> Any:
        """The forward pass; the backward pass of the whole call begins when all that is made of it has a gradient.

        Sharded weights are gathered by all processes together, as the backward pass comes to them. What is made of a
        document need not use all of the outputs, and which it uses depends on its length, so without this processes
        would wait for each other in different places, for ever.
        """
        outputs, structure = tree_flatten(self.engine(*arguments))
        return tree_unflatten(_Together.apply(*outputs), structure)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over processes; the losses are parts of one sum.
        self.engine.backward(loss * ranks.count(), scale_wrt_gas=False)

    def step(self, rates: Sequence[float]) -> float:
        set_rates(self.optimizer, rates)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        # It leaves out a step whose gradient is not finite (from 0.19.8 on), and says so in one of these ways.
        return norm if math.isfinite(norm) and norm != -1.0 else math.inf

    def whole(self) -> AbstractContextManager[Any]:
        return self.gather(list(self.module.parameters())) if self.stage == 3 else nullcontext()

    def save(self, folder: Path) -> None:
        state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        try:
            self.engine.save_checkpoint(str(folder), tag=_SHARDS, client_state=state, save_latest=False)
        except RuntimeError as error:  # what torch's writer makes of a full disk
            if "inline_container" not in str(error):
                raise
            raise OSError(f"the disk is full, or its limit for a file is reached ({folder})") from error

    def load(self, folder: Path) -> None:
        try:
            path, _ = self.engine.load_checkpoint(str(folder), tag=self.tag)
        except (AssertionError, RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
            # A file that was cut short may be either; else it is want of memory, a disk, or a process that died.
            if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
                raise
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            advice = (
                f"remove {folder / _UNIVERSAL} and {folder / 'latest_universal'}, and convert it again"
                if self.tag == _UNIVERSAL
                else f"remove {folder} to start again"
            )
            raise InputError(f"the optimizer state in {folder / self.tag} is damaged ({why}); {advice}") from error
        if path is None:
            raise InputError(f"{folder} holds no optimizer state that DeepSpeed can read; choose another -o")


class _Together(autograd.Function):
    """Tensors as they are; the gradients of all of them arrive together, zero for those that nothing was made of."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def read_settings(path: Path, recipe: Recipe) -> dict[str, Any]:
    """DeepSpeed's settings from a JSON file, with what the recipe decides filled in.

    Raises:
        InputError: no JSON object, or a setting that contradicts the recipe.
    """
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the DeepSpeed settings {path} ({error}); give a JSON file") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no DeepSpeed settings; it needs a JSON object")
    steps = recipe.micro_batches // ranks.count()
    decided = {
        "train_micro_batch_size_per_gpu": recipe.documents,
        "gradient_accumulation_steps": steps,
        "train_batch_size": recipe.documents * recipe.micro_batches,
        "gradient_clipping": recipe.clip,
    }
    for key, value in decided.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise InputError(f"{path}: {key} is {settings[key]}, the recipe says {value}; leave it out or say 'auto'")
    for key, instead in _NOT_MEANT:
        found = settings.get(key)
        if found and not (isinstance(found, dict) and found.get("enabled") is False):
            raise InputError(f"{path}: {key} contradicts the recipe; leave it out and use {instead}")
    for key in sorted(settings.keys() - {*_KEYS, *dict(_NOT_MEANT)}):
        close = get_close_matches(key, _KEYS, n=1, cutoff=0.85)
        instead = f"did you mean {close[0]}?" if close else "leave it out"
        raise InputError(f"{path}: {key} has no effect here; {instead}")
    if not isinstance(kept := settings.get("checkpoint", {}), dict):
        raise InputError(f"{path}: checkpoint is {kept!r}; give its settings, or leave it out")
    if kept.get("load_universal"):
        raise InputError(f"{path}: checkpoint.load_universal is set when it is needed; leave it out")
    found = settings.get("zero_optimization")
    sharding: dict[str, Any] = found if isinstance(found, dict) else {}
    if sharding.get("stage") not in (1, 2, 3):
        raise InputError(f"{path}: zero_optimization needs a stage of 1, 2 or 3; without ZeRO leave out --deepspeed")
    if sharding.get("offload_param") and sharding["stage"] < 3:
        raise InputError(f"{path}: offload_param moves weights, which stage 3 alone shares out; leave it out")
    for key in ("zero_quantized_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if sharding.get(key):
            raise InputError(f"{path}: zero_optimization.{key} contradicts the recipe; leave it out: all is float32")
    # Ours is torch's AdamW, also where the state is offloaded to the CPU.
    return settings | decided | {"zero_force_ds_cpu_optimizer": False}


def join(device: str | None = None) -> None:
    """As `ranks.join`, and for a process that no launcher started a group of its own, which DeepSpeed wants.

    Raises:
        InputError: `device` is one GPU of several, of which DeepSpeed gives each process its own.
    """
    if device is not None and ":" in device:
        raise InputError(f"--device {device}: DeepSpeed gives every process a GPU of its own; leave --device out")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = _import()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks.join(ranks.TRAINING)
    with redirect_stdout(sys.stderr):
        deepspeed.init_distributed()


def _import() -> Any:
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logger = logging.getLogger("DeepSpeed")
        logger.setLevel(logging.WARNING)
        import deepspeed
    except ImportError as error:
        raise InputError('DeepSpeed is not installed; run: pip install "hyperlora[train]"') from error
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    logger.setLevel(logging.WARNING)
    return deepspeed
