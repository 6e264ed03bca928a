"""`hyperlora ask`: the frozen model answers with a patch on."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperlora.cli import loading, options
from hyperlora.errors import InputError
from hyperlora.reading import half_character, read_document

_ADDED = 2  # patches whose sum still answers (docs/results.md)


def ask(
    patches: Annotated[list[Path], typer.Argument(help="Patch directories; several are added up.")],
    questions: Annotated[list[str], typer.Option("--question", "-q", help="What to ask; may be given again.")],
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
    """Ask the frozen base model questions with one or more patches on."""
    from hyperlora.base_model import load_base
    from hyperlora.evaluation.answers import greedy
    from hyperlora.evaluation.window import check_fits
    from hyperlora.inject import patched
    from hyperlora.patch import Patch

    if document is not None and not compare:
        raise InputError("--document is shown beside the patch: add --compare")
    if any(map(half_character, questions)):
        raise InputError("a question is not valid UTF-8; set the terminal's locale to one, such as C.UTF-8")
    text = read_document(document) if document is not None else None
    if len(patches) > _ADDED:
        print(
            f"hyperlora: warning: a sum of more than {_ADDED} patches loses most of what they hold; make one patch of "
            "all documents with hyperlora generate --together",
            file=sys.stderr,
        )
    patch = Patch.compose([Patch.load(path) for path in patches])
    loaded = load_base(
        base or patch.provenance.base, **loading.base_options(device, dtype, quantize, trust_remote_code)
    )
    for question in questions:
        asked = len(loaded.prompt.question_ids(loaded.tokenizer, question)) + max_new_tokens
        check_fits(str(document or "the question"), text or "", asked, loaded)
    prompts = [loaded.prompt.prompt_ids(loaded.tokenizer, question) for question in questions]
    answers: dict[str, list[str]] = {}
    if compare:
        answers["none"] = greedy(loaded, prompts, max_new_tokens)
        if text is not None:
            full = [loaded.prompt.prompt_ids(loaded.tokenizer, question, text) for question in questions]
            answers["document"] = greedy(loaded, full, max_new_tokens)
    with patched(loaded.model, patch):
        answers["patch"] = greedy(loaded, prompts, max_new_tokens)
    records: list[dict[str, Any]] = [
        {"question": question, "answers": {name: replies[index] for name, replies in answers.items()}}
        for index, question in enumerate(questions)
    ]
    if as_json:
        print(json.dumps(records))
        return
    for record in records:
        if not compare:
            print(record["answers"]["patch"])
            continue
        print(f"\n{record['question']}")
        for name, reply in record["answers"].items():
            print(f"  {name + ':':<10}{reply}")
