"""`hyperlora plan`: what a recipe will need on GPUs that are not there yet."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hyperlora.cli import loading, options

if TYPE_CHECKING:
    from hyperlora.planning import MicroBatch

# By their names in JSON: the heading, the ZeRO stage, and whether the hypernetwork is kept in the CPU's memory.
STAGES = {
    "none": ("no ZeRO", None, False),
    "1": ("ZeRO 1", 1, False),
    "2": ("ZeRO 2", 2, False),
    "3": ("ZeRO 3", 3, False),
    "3_offload": ("offloaded", 3, True),
}


def plan(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="A recipe (YAML); see train/. Without one: three questions on documents of 300 tokens."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="As for `train`; only its config is read. Or a config.json.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Processes that share out the micro-batches.")] = 1,
    micro_batches: options.MicroBatches = None,
    documents: Annotated[str, typer.Option(help="Documents per micro-batch to plan for.")] = "1,2,4,8,16",
    gpu_memory: Annotated[float, typer.Option(min=0, help="GiB of a GPU; more is marked with *.")] = 80,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a question in the chat's format.")] = 64,
    reply_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 16,
    tflops: Annotated[
        float | None, typer.Option(min=0, help="Sustained by one GPU; adds the seconds of a step.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu, which reads fewer documents at once.")] = "cuda",
    dtype: Annotated[
        str | None, typer.Option(help="Of the base; default bfloat16, on a CPU float32, as `train` has it.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Show the memory of every GPU at each ZeRO stage, and the operations of a step, without loading a weight.

    The largest documents of the recipe's mix are assumed. What the allocator and CUDA keep for themselves is not in it.
    """
    from tqdm import tqdm

    from hyperlora import planning
    from hyperlora.errors import InputError
    from hyperlora.recipe import read_recipe

    checked = read_recipe(recipe, micro_batches=micro_batches) if recipe else planning.usual(micro_batches or gpus)
    if checked.micro_batches % gpus and micro_batches is not None:
        raise InputError(f"{gpus} GPUs cannot share out --micro-batches {micro_batches}; give a multiple of {gpus}")
    asked, checked.micro_batches = checked.micro_batches, math.ceil(checked.micro_batches / gpus) * gpus
    try:
        counts = [int(part) for part in documents.split(",")]
        assert min(counts) > 0
    except (ValueError, AssertionError):
        raise InputError(f"--documents {documents!r}: give numbers with commas, such as 1,2,4") from None
    loads = planning.read_loads(checked, prompt_tokens, reply_tokens)
    if device not in ("cuda", "cpu"):
        raise InputError(f"unknown device {device!r}; plans are for cuda or cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    kind = loading.base_options(None, dtype, None, False)["dtype"]
    rows = []
    for count in tqdm(counts, unit="plan", disable=None, leave=False):
        step = planning.plan(checked, base, count, loads, kind, device, trust_remote_code)
        memories = {
            name: planning.memory(step, stage, gpus, offloaded=offloaded)
            for name, (_, stage, offloaded) in STAGES.items()
        }
        flops = step.flops * checked.micro_batches / gpus
        rows.append((step, memories, flops))
    if as_json:
        for step, memories, flops in rows:
            by_stage = {name: vars(found) for name, found in memories.items()}
            record = {**vars(step), "step_flops": flops, "memory": by_stage}
            print(json.dumps(record | ({"step_seconds": flops / tflops / 1e12} if tflops else {})))
        return
    gib = 2**30
    step, *_ = rows[0]
    print(f"base        {step.base / gib:.2f} GiB in {dtype} in every process")
    print(f"generator   {step.generator // planning.FLOAT / 1e6:.1f} M parameters ({step.hypernet})")
    if asked != checked.micro_batches:
        print(f"micro_batches {checked.micro_batches}, a multiple of {gpus} GPUs (the recipe has {asked})")
    print(f"{'documents':>9} {'TFLOP/step':>11}", *([f"{'s/step':>8}"] if tflops else []), end="")
    print(*(f"{heading:>9}" for heading, *_ in STAGES.values()), "   GiB per GPU")
    for one, memories, flops in rows:
        print(
            f"{one.documents:9d} {flops / 1e12:11.2f}", *([f"{flops / tflops / 1e12:8.3f}"] if tflops else []), end=""
        )
        cells = [found.total / gib for found in memories.values()]
        print(*(f"{f'{cell:.1f}' + '*' * (cell > gpu_memory):>9}" for cell in cells))
    if rows[0][1]["3_offload"].total > gpu_memory * gib:
        print(_advice(step, gpu_memory * gib))


def _advice(step: "MicroBatch", limit: float) -> str:
    if step.base > limit:
        return (
            "the base alone does not fit, and every process holds all of it; choose a smaller one, or --dtype bfloat16"
        )
    return "even the first row does not fit: lower documents, max_tokens or questions, or set checkpointing: true"
