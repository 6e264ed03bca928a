"""`hyperlora ask`: the frozen model answers with a patch on."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import loading, options
from hyperlora.errors import InputError
from hyperlora.files import read_document


def ask(
    patches: Annotated[list[Path], typer.Argument(help="Patch directories; several are added up.")],
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask.")],
    compare: Annotated[bool, typer.Option("--compare", help="Show the answers without and with the patch.")] = False,
    document: Annotated[Path | None, typer.Option(help="With --compare: the full document in the prompt too.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    base: options.Base = None,
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Ask the frozen base model a question with one or more patches on."""
    from hyperlora.base_model import load_base
    from hyperlora.evaluation.answers import greedy
    from hyperlora.inject import patched
    from hyperlora.patch import Patch

    if document is not None and not compare:
        raise InputError("--document is shown beside the patch: add --compare")
    text = read_document(document) if document is not None else None
    patch = Patch.compose([Patch.load(path) for path in patches])
    loaded = load_base(
        base or patch.provenance.base, **loading.base_options(device, dtype, quantize, trust_remote_code)
    )
    prompt = loaded.prompt.prompt_ids(loaded.tokenizer, question)
    answers = {}
    if compare:
        answers["none"] = greedy(loaded, [prompt], max_new_tokens)[0]
        if text is not None:
            full = loaded.prompt.prompt_ids(loaded.tokenizer, question, text)
            answers["document"] = greedy(loaded, [full], max_new_tokens)[0]
    with patched(loaded.model, patch):
        answers["patch"] = greedy(loaded, [prompt], max_new_tokens)[0]
    if as_json:
        print(json.dumps({"question": question, "answers": answers}))
    elif compare:
        for name, answer in answers.items():
            print(f"{name + ':':<10}{answer}")
    else:
        print(answers["patch"])
