"""`hyperlora methods` and `hyperlora tasks`: what an experiment of `compare` can name, and what its keys mean."""

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from hyperlora.cli import options
from hyperlora.errors import InputError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

Name = Annotated[str | None, typer.Argument(help="Only this one, and what its settings mean.")]


def methods(name: Name = None, as_json: options.Json = False) -> None:
    """List the methods that `compare` knows, with their settings."""
    from hyperlora.methods import METHODS

    if as_json:
        print(json.dumps({key: METHODS[key].Settings.model_json_schema() for key in _chosen(METHODS, name)}))
        return
    for key in _chosen(METHODS, name):
        settings = METHODS[key].Settings
        meaning = inspect.getdoc(settings) if name and settings.model_fields else None
        _show(key, METHODS[key].summary(), meaning, settings)


def tasks(name: Name = None, as_json: options.Json = False) -> None:
    """List the tasks that `compare` knows, with their settings."""
    from hyperlora.tasks import TASKS, Task

    shared = (inspect.getdoc(Task) or "").partition("    items:")
    if as_json:
        print(json.dumps({key: TASKS[key].model_json_schema() for key in _chosen(TASKS, name)}))
        return
    for key in _chosen(TASKS, name):
        summary, *meaning = (inspect.getdoc(TASKS[key]) or "").split("\n", 1)
        meaning.append("Of all tasks:\n" + "".join(shared[1:]))
        _show(key, summary, "\n\n".join(map(str.strip, meaning)) if name else None, TASKS[key])


def _chosen(registry: Mapping[str, object], name: str | None) -> list[str]:
    if name is not None and name not in registry:
        raise InputError(f"unknown name {name!r}; {nearest(name, registry)}")
    return sorted(registry) if name is None else [name]


def _show(name: str, summary: str, meaning: str | None, settings: type["BaseModel"]) -> None:
    print(f"{name}: {summary}")
    if meaning:
        print("", *meaning.splitlines(), "", sep="\n")
    for key, field in settings.model_fields.items():
        print(f"    {key}" + (" (required)" if field.is_required() else f" = {field.get_default()!r}"))
