"""`hyperlora compose`: several patches become one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import options
from hyperlora.errors import InputError
from hyperlora.files import check_directory


def compose(
    patches: Annotated[list[Path], typer.Argument(help="Patch directories for the same base.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    weights: Annotated[str | None, typer.Option(help="Weights, such as 1,0.5; default 1 each.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Cap the rank; default: the exact sum of the ranks.")] = None,
    norm_limit: Annotated[
        float | None, typer.Option(help="Scale down to so many times the largest part's norm; default: no limit.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Add patches up, weighted, into one PEFT adapter."""
    from hyperlora.patch import PROVENANCE, Patch

    check_directory(output, PROVENANCE, force)
    try:
        numbers = [float(part) for part in weights.split(",")] if weights else None
    except ValueError as error:
        raise InputError(f"--weights {weights!r}: use numbers with commas between, such as 1,0.5") from error
    composed = Patch.compose([Patch.load(path) for path in patches], numbers, rank, norm_limit)
    composed.save(output, force)
    if as_json:
        record = {"path": str(output), "patches": len(patches), "rank": composed.rank, "bytes": composed.nbytes}
        print(json.dumps(record))
        return
    print(f"{output}: {len(patches)} patches, rank {composed.rank}, {composed.nbytes / 1e6:.2f} MB")
