"""`hyperlora evaluate`: a generator's answers beside their controls, with intervals."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import loading, options
from hyperlora.errors import InputError
from hyperlora.files import check_free, write_text


def evaluate(
    facts: Annotated[int | None, typer.Option(min=1, help="Invented facts per document.")] = None,
    new_attributes: Annotated[bool, typer.Option(help="With --facts: attributes that no recipe trains on.")] = False,
    qa: Annotated[str | None, typer.Option(help="A SQuAD-style source or file, one question per document.")] = None,
    needles: Annotated[
        str | None, typer.Option(help="One invented fact in a piece of a book; its tokens, e.g. 200,500,1000,2000.")
    ] = None,
    forgetting: Annotated[str | None, typer.Option(help="Text source on which the loss with a patch is taken.")] = None,
    in_prompt: Annotated[
        bool, typer.Option(help="With --forgetting: the text stands where a prompt has its document.")
    ] = False,
    second_copy: Annotated[
        str | None, typer.Option(help="Source whose documents are read with their own patch.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(min=2, help="Documents; default 500, 32 of --forgetting, or all of a source.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=8, help="Longest document of --qa and --second-copy; default 200.")
    ] = None,
    conditions: Annotated[
        str | None, typer.Option(help="Of none, full, patch, swapped, beside; default the first four.")
    ] = None,
    generator: options.GeneratorName = None,
    base: options.Base = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the result as JSON.")] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Score a generator against full context, no context and another document's patch (95 % bootstrap intervals)."""
    from hyperlora.evaluation.items import fact_items, needle_items, qa_items
    from hyperlora.evaluation.report import evaluate_answers, evaluate_forgetting, evaluate_second_copy, table

    if sum(choice is not None for choice in (facts, qa, needles, forgetting, second_copy)) != 1:
        raise InputError(
            "choose one of --facts N, --qa SOURCE, --needles TOKENS, --forgetting SOURCE, --second-copy SOURCE"
        )
    lengths = [_tokens(length) for length in needles.split(",")] if needles is not None else []
    for name, given, fits in (
        ("--new-attributes", new_attributes, facts),
        ("--in-prompt", in_prompt, forgetting),
        ("--max-tokens", max_tokens, qa or second_copy),
        ("--conditions", conditions, facts or qa or needles),
    ):
        if given and not fits:
            raise InputError(f"{name} says nothing about what is measured here; leave it out")
    max_tokens = max_tokens or 200
    if output is not None:
        check_free(output, force)
        if not output.parent.is_dir():
            raise InputError(f"no directory {output.parent} for the result; make it first")
    loaded = loading.load(generator, base, loading.base_options(device, dtype, None, trust_remote_code))
    if forgetting is not None:
        result = evaluate_forgetting(loaded, forgetting, items or 32, in_prompt)
    elif second_copy is not None:
        result = evaluate_second_copy(loaded, second_copy, max_tokens, items)
    else:
        if facts is not None:
            name = f"{facts} facts" + (", new attributes" if new_attributes else "")
            asked = fact_items(facts, items or 500, new_attributes)
        elif qa is not None:
            name, asked = f"{qa}, up to {max_tokens} tokens", qa_items(qa, loaded.base, max_tokens, items)
        else:
            name, asked = f"needles in {needles} tokens", needle_items(loaded.base, lengths, items)
        chosen = dict.fromkeys((conditions or "none,full,patch,swapped").split(","))
        result = evaluate_answers(loaded, name, asked, list(chosen))
    print(json.dumps(result) if as_json else table(result))
    if output is not None:
        write_text(output, json.dumps(result, indent=1) + "\n")


def _tokens(length: str) -> int:
    if not length.strip().isdecimal():
        raise InputError(f"--needles: {length!r} is no number of tokens; give some, with commas between them")
    return int(length)
