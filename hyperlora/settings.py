"""Settings that users write: reading YAML, and saying in one line what is wrong with it."""

import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hyperlora.errors import InputError, nearest


def read_yaml(path: Path, kind: str) -> Any:
    """The content of a YAML file, a `kind` of file for the error message. Raises InputError when it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def explain(error: ValidationError, known: Iterable[str]) -> str:
    """The first fault of settings, in one line; `known` are the keys that may stand where the fault is."""
    first = error.errors()[0]
    where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    if not where:  # a rule about several keys
        return message
    return f"{where}: {message} (got {reprlib.repr(first['input'])})"
