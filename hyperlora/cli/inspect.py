"""`hyperlora inspect`: where a patch comes from and what it holds."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import options


def inspect(patch: Annotated[Path, typer.Argument(help="A patch directory.")], as_json: options.Json = False) -> None:
    """Show a patch's base model, generator, documents, rank, size and the norm of its change per module."""
    from hyperlora.norm_control import update_norm
    from hyperlora.patch import Patch

    loaded = Patch.load(patch)
    norms = {path: float(update_norm(a, b)) for path, (a, b) in loaded.factors.items()}
    record = {
        "rank": loaded.rank,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "bytes": loaded.nbytes,
        **asdict(loaded.provenance),
        "norms": norms,
    }
    if as_json:
        print(json.dumps(record))
        return
    origin = loaded.provenance
    print(f"base       {origin.base} (config {origin.fingerprint.config}, weights {origin.fingerprint.weights})")
    print(f"generator  {origin.generator} ({origin.generator_hash}), hyperlora {origin.version}")
    print(f"patch      rank {loaded.rank}, {record['dtype']}, {loaded.nbytes} bytes, {len(norms)} modules")
    for document in origin.documents:
        print(f"document   {document['sha256'][:16]}, {document['tokens']} tokens, weight {document['weight']}")
    for path, norm in norms.items():
        print(f"module     {path}  |B A| = {norm:.3f}")
