"""Settings that users write: reading YAML, and saying in one line what is wrong with it."""

import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hyperlora.errors import InputError, nearest


class _Loader(yaml.SafeLoader):
    """YAML in which every key of a mapping stands once: of several, PyYAML would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    where = f"{self.name}, line {line}"
                    raise InputError(f"{where}: the key {key.value!r} stands in line {lines[name]} already; remove one")
                lines[name] = line
        return node


def read_yaml(path: Path, kind: str) -> Any:
    """The content of a YAML file, a `kind` of file for the error message.

    Raises:
        InputError: it cannot be read, is not YAML, or has a key twice (file, line and key are named).
    """
    try:
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _Loader)
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
