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
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Train a generator; run the same command again to resume it.

    The folder holds metrics.jsonl, checkpoint/ and, at the end, generator/ for `generate --generator`.
    """
    from hyperlora.recipe import read_recipe
    from hyperlora.training import start

    checked = read_recipe(recipe, base=base, steps=steps, seed=seed)
    trainer = start(checked, output, recipe.stem, **loading.base_options(device, dtype, None, trust_remote_code))
    trainer.run()
    summary = trainer.summary()
    print(json.dumps(summary) if as_json else summary["generator"])
