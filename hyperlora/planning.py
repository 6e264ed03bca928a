"""What a training run will need, computed before there is a machine: memory of each process, operations of a step.

The base is built from its config alone with tensors that have shapes and no data, and one micro-batch of the recipe's
largest documents runs through generator and student in that form. What lives at the peak and what is computed is then
known for any architecture, without a formula for each.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as checkpointed

from hyperlora.activations import checkpoint_layers
from hyperlora.base_model import DEFAULT_BASE, BaseModel, BaseNotFound, locate
from hyperlora.flop_counter import flop_counter
from hyperlora.generator import Generator
from hyperlora.generator_files import stored_config
from hyperlora.groups import BATCH_TOKENS
from hyperlora.inject import Factors, inject
from hyperlora.learning_rates import rated_groups
from hyperlora.leaves import joined, leaves_of
from hyperlora.live_bytes import LiveBytes
from hyperlora.recipe import FactsTask, MadeTask, QATask, Recipe, TextTask
from hyperlora.structure import UnsupportedBase
from hyperlora.student import BEFORE, RECALLED, UNSCORED
from hyperlora.zero import BUCKET

FLOAT = 4  # bytes of a number of the trained module, its gradient and each of Adam's moments
_FACT_TOKENS = 14
_QUOTED_TOKENS = 60  # of the sentence that a made question quotes
_PREFETCH = 50_000_000  # numbers; DeepSpeed's default for `stage3_prefetch_bucket_size`


@dataclass(frozen=True)
class Load:
    """The largest thing that a task of the mix brings into a micro-batch, in tokens.

    Attributes:
        document: tokens of a document; `questions` rows of `row` tokens are asked on each, `labels` of them scored.
        alike: tokens that its rows all begin with.
    """

    document: int
    questions: int
    row: int
    labels: int
    weight: float
    alike: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """Sizes in bytes, `flops` of forward and backward passes, the mean over tasks.

    Attributes:
        hypernet: its architecture.
        base: the frozen weights.
        generator: weights of the hypernetwork in float32, `trained` those of them that learn; `calibration`, what it
            measured of the base.
        working: the most that lives besides the weights and their gradients, of the worst task.
    """

    documents: int
    hypernet: str
    base: int
    generator: int
    trained: int
    calibration: int
    working: int
    flops: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its GPU, at one ZeRO stage (None: without DeepSpeed); `host` are in the CPU's memory."""

    stage: int | None
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    total: int
    host: int = 0


def usual(micro_batches: int) -> Recipe:
    """A recipe to plan with where there is none: the default generator, questions on short documents."""
    mix = [{"task": "qa", "sources": [], "max_tokens": 300, "questions": 3}]
    calibration: dict[str, Any] = {"sources": []}
    return Recipe.model_validate({"steps": 1, "micro_batches": micro_batches, "calibration": calibration, "mix": mix})


def read_loads(recipe: Recipe, prompt_tokens: int, reply_tokens: int) -> list[Load]:
    """The loads of a recipe's tasks; a prompt has `prompt_tokens`, its reply `reply_tokens`."""
    loads = []
    for task in recipe.mix:
        row = prompt_tokens + reply_tokens
        if isinstance(task, FactsTask):
            tokens = _FACT_TOKENS * task.facts[1] + (task.tokens[1] if task.haystack else 0)
            loads.append(Load(tokens, task.questions, row, reply_tokens, task.weight))
        elif isinstance(task, QATask):
            loads.append(Load(task.max_tokens, task.questions, row, reply_tokens, task.weight))
        elif isinstance(task, MadeTask):
            loads.append(Load(task.tokens[1], task.questions, row + _QUOTED_TOKENS, reply_tokens, task.weight))
        else:
            assert isinstance(task, TextTask)
            row = 1 + BEFORE + max(RECALLED, task.following)  # the first is the sink's
            labels = max(BEFORE + RECALLED - UNSCORED, task.following)
            loads.append(Load(task.tokens[1], 2, row, labels, task.weight))
    return loads


def plan(
    recipe: Recipe,
    base: str | None,
    documents: int,
    loads: list[Load],
    dtype: torch.dtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> MicroBatch:
    """Sizes of a micro-batch of `documents`; on a `device` of type "cuda" more of them are read together.

    Raises:
        BaseNotFound: there is no config of that base.
        UnsupportedBase, InputError: no generator can be made for it, there is none to start from, or none of its
            parameters has a name that the recipe trains.
    """
    config = _config(base or recipe.base or DEFAULT_BASE, trust_remote_code)
    chosen = stored_config(recipe.start_from, recipe.generator)
    with FakeTensorMode():
        model = _bare(config, dtype, trust_remote_code)
        generator = Generator(model, chosen)
        generator.encoder.batch_tokens = BATCH_TOKENS[device]
        if recipe.checkpointing:
            generator.through = partial(checkpointed, generator.hypernet, use_reentrant=False)
            checkpoint_layers(model.model)
        rated_groups(generator.hypernet, recipe)
        trained = [parameter for parameter in generator.hypernet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        held = [*model.model.parameters(), *model.model.buffers(), *generator.parameters(), *generator.buffers()]
        held += [parameter.grad for parameter in trained if parameter.grad is not None]
        peak, operations = 0, 0.0
        for load in loads:
            with LiveBytes(held) as live, flop_counter() as counter:
                _micro_batch(generator, recipe, documents, load, BATCH_TOKENS[device])
            peak = max(peak, live.peak)
            operations += counter.get_total_flops() * load.weight / sum(other.weight for other in loads)
    return MicroBatch(
        documents,
        chosen.hypernet,
        _bytes(model.model.parameters()) + _bytes(model.model.buffers()),
        _bytes(generator.hypernet.parameters()),
        _bytes(trained),
        _bytes(generator.statistics.buffers()),
        peak,
        operations,
    )


def memory(
    step: MicroBatch, stage: int | None, processes: int, bucket: int = BUCKET, offloaded: bool = False
) -> Memory:
    """Bytes of one of `processes`. ZeRO keeps a flat copy of its share of the weights, which the optimizer updates.

    Without DeepSpeed nothing is shared out. Stage 1 shares out the optimizer's state, 2 the gradients too, 3 the
    weights too. Every process holds the whole base. Buffers are what gradients are summed in (two at stage 2, as
    ds_configs/zero2.json has it) and weights are gathered in; they and a step of the optimizer do not come at the same
    time as the activations' peak, but allocators keep them. With `offloaded` (ds_configs/zero3_offload.json) they are
    all that a GPU holds of the hypernetwork, whose share is in the CPU's memory.
    """
    weights, learned = step.generator, step.trained
    share, summed = learned // processes, min(learned, FLOAT * bucket)
    if stage is None:
        gradients, optimizer = learned, 2 * learned
        buffers = learned if processes > 1 else 0
    elif stage == 1:
        gradients, optimizer, buffers = learned, 3 * share, summed
    elif stage == 2:  # while one buffer is sent, another is filled
        gradients, optimizer, buffers = share, 3 * share, 2 * summed
    else:
        buffers = min(weights, FLOAT * _PREFETCH) + summed
        weights, gradients, optimizer = weights // processes, share, 3 * share
    host = weights + gradients + optimizer if offloaded else 0
    if offloaded:
        weights = gradients = optimizer = 0
    fixed = step.base + step.calibration + weights + gradients + optimizer
    return Memory(stage, weights, gradients, optimizer, buffers, fixed + buffers + step.working, host)


def _micro_batch(generator: Generator, recipe: Recipe, documents: int, load: Load, at_once: int) -> None:
    """What `Trainer.train_step` does to a micro-batch, in passes of `at_once` padded tokens at most."""
    base, told = generator.base, load.document + load.row
    factors = generator.factors([[0] * load.document] * documents)
    leaves = leaves_of(factors)
    packed = load.alike + load.questions * (load.row - load.alike)
    for some in _passes(documents, packed, at_once):
        count = some.stop - some.start
        if recipe.teacher.hidden:
            with torch.no_grad():
                _logits(base, count * load.questions, told, load.labels)
        with _injected(base, leaves, some):
            logits = _logits(base, count, packed, load.questions * load.labels)
            F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum").backward()
        del logits
    if recipe.beside:
        for some in _passes(math.ceil(documents * recipe.beside.share), told, at_once):
            with _injected(base, leaves, some):
                logits = _logits(base, some.stop - some.start, told, load.labels)
                F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="sum").backward()
            del logits
    if recipe.unrelated:
        tokens = recipe.unrelated.tokens
        for some in _passes(math.ceil(documents * recipe.unrelated.share), tokens, at_once):
            rows = some.stop - some.start
            with torch.no_grad():
                bare = _logits(base, rows, tokens, tokens)
            with _injected(base, leaves, some):
                patched = F.log_softmax(_logits(base, rows, tokens, tokens), dim=-1)
                F.kl_div(patched, F.log_softmax(bare, dim=-1), reduction="sum", log_target=True).backward()
            del bare, patched
    joined(factors, leaves).backward()


def _passes(documents: int, tokens: int, at_once: int) -> Iterator[slice]:
    """The documents of every pass, with so many tokens for each; never less than a whole document."""
    count = max(1, at_once // tokens)
    for start in range(0, documents, count):
        yield slice(start, min(documents, start + count))


def _injected(base: BaseModel, leaves: Factors, some: slice) -> AbstractContextManager[None]:
    own = {path: (a, b) if len(a) == 1 else (a[some], b[some]) for path, (a, b) in leaves.items()}
    return inject(base.model, own)


def _logits(base: BaseModel, rows: int, tokens: int, labels: int) -> Tensor:
    """(rows * labels, vocabulary) in float32."""
    hidden = base.model.base_model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)[0]
    return base.model.get_output_embeddings()(hidden[:, -labels:].flatten(0, 1)).float()


def _config(name: str, trust_remote_code: bool) -> Any:
    """The config of a base, or the one in a JSON file."""
    try:
        if name.endswith(".json"):
            fields = json.loads(Path(name).read_text())
            return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        return transformers.AutoConfig.from_pretrained(locate(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseNotFound(f"no config of a base model at {name} ({str(error).splitlines()[0]})") from error


def _bare(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> BaseModel:
    """A base without data. Of its tokenizer only the first token matters, which a chunk starts with."""
    build = partial(
        transformers.AutoModelForCausalLM.from_config, config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    try:
        model = build(attn_implementation="sdpa")
    except ValueError:  # an architecture that has none
        try:
            model = build(attn_implementation="eager")
        except ValueError as error:
            raise UnsupportedBase(f"{config.model_type} is no causal language model") from error
    tokenizer = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    return BaseModel("planned", model, fast)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
