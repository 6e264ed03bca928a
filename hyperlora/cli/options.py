"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from hyperlora.errors import InputError

Base = Annotated[str | None, typer.Option("--base", help="Base model: embedded name, directory, .gguf file or hub id.")]
GeneratorName = Annotated[
    str | None, typer.Option("--generator", help="Generator: directory or hub id; default is the one that ships.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; default: CUDA when present.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 for the base model.")]
MicroBatches = Annotated[
    int | None, typer.Option(min=1, help="Replaces the recipe's micro_batches, which processes share out.")
]
LocalRank = Annotated[  # deepspeed says it twice; LOCAL_RANK is what counts
    int | None, typer.Option("--local_rank", "--local-rank", hidden=True)
]
Quantize = Annotated[int | None, typer.Option("--quantize", help="Load the base in 4 or 8 bits (bitsandbytes).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a hub model run its own code. Off unless asked.")
]
Compared = Annotated[Path, typer.Argument(help="Folder of `hyperlora compare`.")]
First = Annotated[str, typer.Argument(help="Label of the method whose win rate is wanted.")]
Second = Annotated[str, typer.Argument(help="Label of the method that it is compared with.")]
TaskLabel = Annotated[str | None, typer.Option("--task", help="Only the questions of this task; default: of all.")]
Items = Annotated[int | None, typer.Option("--items", min=1, help="Only the first so many questions.")]
Seed = Annotated[int, typer.Option("--seed", help="Which reply is shown as A, and the order of rows in a sheet.")]


def read_shard(text: str | None) -> tuple[int, int]:
    """`i/n`, i from 1; the whole when there is none. Raises InputError for anything else."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard {text!r}: use i/n with i from 1 to n, such as 1/4")
    return int(match[1]), int(match[2])


def own_shard(text: str | None) -> tuple[int, int]:
    """What `--shard` says; under a launcher, whose processes it joins, this one's share. Raises InputError where both
    say something."""
    from hyperlora import ranks

    if ranks.launched() > 1 and text is not None:
        raise InputError("--shard is set by the launcher's rank here; leave it out")
    part = read_shard(text)
    ranks.join()
    return (ranks.own() + 1, ranks.count()) if ranks.launched() > 1 else part
