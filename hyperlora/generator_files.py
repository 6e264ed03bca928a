"""A generator on disk: config.json, and model.safetensors with the hypernetwork in float16, calibration in float32."""

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hyperlora.errors import InputError
from hyperlora.files import from_hub, may_be_on_hub, new_directory
from hyperlora.fingerprint import Fingerprint
from hyperlora.generator_config import GeneratorConfig
from hyperlora.patch import Provenance

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class StoredGenerator(NamedTuple):
    """What a generator's config.json says.

    Attributes:
        wanted: the base that it was trained for.
        sites: of that base, as `Site.to_dict` gives them.
    """

    folder: Path
    name: str
    config: GeneratorConfig
    wanted: Provenance
    sites: list[dict[str, Any]]

    @classmethod
    def find(cls, name: str | Path | None) -> "StoredGenerator":
        """The one that ships with the package (None), one in a local directory, or one of the hub.

        Raises:
            InputError: there is none, or it is damaged.
        """
        folder = _locate(name)
        try:
            record = json.loads((folder / CONFIG).read_text())
            config = GeneratorConfig(**record["generator"])
            wanted = Provenance(record["base"], Fingerprint(**record["fingerprint"]))
            with safe_open(folder / WEIGHTS, framework="pt"):
                return cls(folder, record["name"], config, wanted, record.get("sites", []))
        except (OSError, SafetensorError, ValidationError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no usable generator ({str(error).splitlines()[0]})") from error

    def tensors(self, expected: Mapping[str, tuple[int, ...]], changed: bool = False) -> dict[str, Tensor]:
        """The weights, which must have the `expected` names and shapes; a file that does not is not read. Where the
        settings are `changed` from the generator's own, parts of the hypernetwork may be missing.

        Raises:
            InputError: other names or shapes, or values that are not finite.
        """
        path = self.folder / WEIGHTS
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            added = {name for name in expected.keys() - shapes.keys() if changed and name.startswith("hypernet.")}
            named = (expected.keys() | shapes.keys()) - added
            if wrong := sorted(name for name in named if expected.get(name) != shapes.get(name)):
                what = "the changed settings of the generator" if changed else "its config.json"
                raise InputError(f"{path} does not fit {what}: {len(wrong)} tensors, first {wrong[0]}")
            tensors = {name: file.get_tensor(name) for name in names}
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise InputError(f"{path} has non-finite values in {bad[0]}")
        return tensors


def stored_config(name: str | None, changes: GeneratorConfig) -> GeneratorConfig:
    """The settings of a generator that a run starts from, with its changes; those alone where it starts from none.
    Raises InputError."""
    return StoredGenerator.find(name).config.changed(changes) if name else changes


def stored_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A generator's `state_dict` as it is saved, on the CPU."""
    return {
        name: tensor.detach().to("cpu", torch.float16 if name.startswith("hypernet.") else None).contiguous()
        for name, tensor in state.items()
    }


def write_generator(path: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor], force: bool) -> None:
    """Write both files, atomically.

    Raises:
        InputError: `path` exists (without `force`, or it is no generator's), or the disk is full.
    """
    with new_directory(path, CONFIG, force) as folder:
        (folder / CONFIG).write_text(json.dumps(record, indent=1) + "\n")
        save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def _locate(name: str | Path | None) -> Path:
    if name is None:
        folder = Path(str(files("hyperlora") / "pretrained"))
        if not (folder / CONFIG).exists():
            raise InputError("this installation carries no trained generator; train one or pass its directory")
        return folder
    if Path(name).is_dir():
        return Path(name)
    if not may_be_on_hub(name):
        raise InputError(f"no generator at {name}: give a directory that `hyperlora train` wrote, or a hub id")
    return from_hub("generator", str(name), [CONFIG, WEIGHTS])
