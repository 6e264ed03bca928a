"""`hyperlora train`: a recipe becomes a generator."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import loading, options


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); see train/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; resumes the run it holds.")],
    base: options.Base = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Replaces the recipe's number of steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Replaces the recipe's documents of a micro-batch.")
    ] = None,
    micro_batches: options.MicroBatches = None,
    start_from: Annotated[
        str | None, typer.Option(help="Go on from the weights of this generator: a directory or a hub id.")
    ] = None,
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    deepspeed: Annotated[
        Path | None, typer.Option(help="DeepSpeed settings (JSON), such as ds_configs/zero2.json.")
    ] = None,
    trackers: Annotated[
        list[str], typer.Option("--track", help="tensorboard, wandb or trackio; may be repeated.")
    ] = [],  # noqa: B006 (typer copies it)
    local_rank: options.LocalRank = None,
) -> None:
    """Train a generator; run the same command again to resume it.

    The folder holds metrics.jsonl, checkpoint/ and, at the end, generator/ for `generate --generator`. Under torchrun
    or deepspeed the processes share out the micro-batches of every step.
    """
    from hyperlora import ranks
    from hyperlora.recipe import read_recipe
    from hyperlora.trackers import check, track
    from hyperlora.training import start

    check(trackers)
    changes = {"base": base, "steps": steps, "seed": seed, "start_from": start_from}
    changes |= {"documents": documents, "micro_batches": micro_batches}
    checked = read_recipe(recipe, **changes)
    settings = None
    if deepspeed is None:
        ranks.join(ranks.TRAINING)
    else:
        from hyperlora import zero

        zero.join(device)
        settings = zero.read_settings(deepspeed, checked)
    loaded = loading.base_options(device, dtype, None, trust_remote_code)
    trainer = start(checked, output, recipe.stem, settings, **loaded)
    settings_shown, step = checked.model_dump(mode="json"), trainer.step + 1 if trainer.step else 0
    with track(trackers if ranks.own() == 0 else [], output, settings_shown, step) as hand_on:
        trainer.run(hand_on)
    if ranks.own() == 0:
        summary = trainer.summary()
        print(json.dumps(summary) if as_json else summary["generator"])
    ranks.leave()
