"""`hyperlora judge`: a language model compares the replies of two methods."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperlora.cli import options
from hyperlora.errors import InputError
from hyperlora.files import check_free, write_text


def judge(
    folder: options.Compared,
    first: options.First,
    second: options.Second,
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible address, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="The judge, as the endpoint calls it.")],
    request: Annotated[
        str | None,
        typer.Option(help='Further fields of every request, as JSON; default {"temperature": 0, "max_tokens": 512}.'),
    ] = None,
    task: options.TaskLabel = None,
    items: options.Items = None,
    seed: options.Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Result; default: FOLDER/judge-FIRST-vs-SECOND.json.")
    ] = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Let a language model say, blind, which of two methods answers better; the win rate has a 95 % interval.

    Its key is read from HYPERLORA_JUDGE_KEY or OPENAI_API_KEY. Every verdict is kept in FOLDER/judge-cache.jsonl: the
    same command goes on where it was stopped, and asks for nothing twice.
    """
    from hyperlora.evaluation.comparison import summary
    from hyperlora.evaluation.endpoint import Endpoint
    from hyperlora.evaluation.judge import judge as ask
    from hyperlora.evaluation.replies import read_comparisons

    comparisons = read_comparisons(folder, first, second, task, items)
    asked = Endpoint(endpoint, model) if request is None else Endpoint(endpoint, model, _fields(request))
    setting: dict[str, Any] = {"methods": [first, second], "judge": model, "task": task, "items": items, "seed": seed}
    setting["request"] = dict(asked.options)
    target = output or folder / f"judge-{_file_part(first)}-vs-{_file_part(second)}.json"
    if not target.parent.is_dir():
        raise InputError(f"no directory {target.parent} for the result; make it first")
    check_free(target, force or _holds(target, setting))
    found = ask(comparisons, asked, folder / "judge-cache.jsonl", seed, progress="judge")
    result = setting | found
    write_text(target, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if as_json else f"{summary(result)}, {result['unparsable']} unparsable")


def _fields(request: str) -> dict[str, Any]:
    try:
        fields = json.loads(request)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or {"model", "messages"} & set(fields):
        raise InputError("--request needs a JSON object of fields besides model and messages, such as {}")
    return fields


def _file_part(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", label)[:80]  # names of files have at most 255 bytes


def _holds(path: Path, setting: dict[str, Any]) -> bool:
    """Whether the file is the result of the same setting, which may be written anew."""
    try:
        old = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(old, dict) and {key: old.get(key) for key in setting} == setting
