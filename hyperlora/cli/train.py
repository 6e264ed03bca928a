"""`hyperlora train`: a recipe becomes a generator."""

from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import options


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); see train/.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; resumes the run it holds.")],
    base: options.Base = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Replaces the recipe's number of steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")] = None,
) -> None:
    """Train a generator; run the same command again to resume it.

    The folder holds metrics.jsonl, checkpoint/ and, at the end, generator/ for `generate --generator`.
    """
    from hyperlora.recipe import read_recipe
    from hyperlora.training import start

    checked = read_recipe(recipe, base=base, steps=steps, seed=seed)
    start(checked, output, recipe.stem).run()
    print(output / "generator")
