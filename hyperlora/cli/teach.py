"""`hyperlora teach`: the base's own answers with the document in the prompt, as targets for training."""

from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import loading, options


def teach(
    sources: Annotated[list[str], typer.Argument(help="SQuAD-style sources or .jsonl files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the replies; an unfinished one goes on.")],
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest document.")] = 200,
    top_k: Annotated[int, typer.Option(min=1, help="Likeliest tokens kept at each position.")] = 16,
    reply_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 48,
    phrased: Annotated[
        bool, typer.Option(help="Have the model say the question's own answer; else its greedy reply.")
    ] = True,
    shard: Annotated[str | None, typer.Option(help="i/n: do every n-th file only, i from 1.")] = None,
    base: options.Base = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Have the base answer questions with the document in its prompt, once, for any number of training runs.

    Name the folder in a recipe: `teacher: {corpora: [FOLDER]}`. Under torchrun or deepspeed every rank does a share.
    """
    from hyperlora import ranks
    from hyperlora.base_model import load_base
    from hyperlora.data.sources import load
    from hyperlora.data.teacher import teach as make
    from hyperlora.prompt import document_ids

    part = options.own_shard(shard)
    items = [item for source in sources for item in load(source)]
    loaded = load_base(base, **loading.base_options(device, dtype, None, trust_remote_code))
    kept = [item for item in items if len(document_ids(loaded.tokenizer, item.text)) <= max_tokens]
    make(loaded, kept, output, part, top_k, reply_tokens, phrased)
    ranks.leave()
    if part[0] == 1:
        print(output)
