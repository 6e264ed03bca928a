"""Train the control "adapted full context" on the questions of a generator's recipe.

python train/adapted_full.py train/default.yaml -o runs/adapted --rates 3e-4,1e-3,3e-3
"""

from pathlib import Path
from typing import Annotated

import typer

from hyperlora.adapter_training import train_adapter
from hyperlora.base_model import load_base
from hyperlora.cli import guarded, loading, options
from hyperlora.errors import InputError
from hyperlora.recipe import read_recipe


def main(
    recipe: Annotated[Path, typer.Argument(help="Recipe of the generator that is compared.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs; the adapter comes to adapter/.")],
    rates: Annotated[str, typer.Option(help="Learning rates to choose from.")] = "3e-4,1e-3,3e-3",
    sweep_steps: Annotated[
        int | None, typer.Option(help="Compare the rates after so many steps; train only the best to the end.", min=1)
    ] = None,
    base: Annotated[str | None, typer.Option(help="Another base than the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Replaces the recipe's number of steps.")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Replaces the recipe's documents of a step.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Train one LoRA with the document in the prompt, at every learning rate; keep the best on held-out documents."""
    try:
        chosen = [float(rate) for rate in rates.split(",")]
    except ValueError as error:
        raise InputError(f"--rates {rates}: give numbers with commas between them, such as 3e-4,1e-3") from error
    read = read_recipe(recipe, base=base, steps=steps, documents=documents)
    loaded = load_base(read.base, **loading.base_options(device, dtype, None, trust_remote_code))
    for name, loss in train_adapter(read, loaded, chosen, output, sweep_steps).items():
        print(f"{name}: {loss:.3f} nats per token on held-out documents")


if __name__ == "__main__":
    guarded(lambda: typer.run(main))
