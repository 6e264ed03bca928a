"""Options that several commands share."""

import re
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
Quantize = Annotated[int | None, typer.Option("--quantize", help="Load the base in 4 or 8 bits (bitsandbytes).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a hub model run its own code. Off unless asked.")
]


def read_shard(text: str | None) -> tuple[int, int]:
    """`i/n`, i from 1; the whole when there is none. Raises InputError for anything else."""
    if text is None:
        return 1, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard {text!r}: use i/n with i from 1 to n, such as 1/4")
    return int(match[1]), int(match[2])
