"""What a method trained once and uses for every document: an adapter, new token rows, and where the adapter acts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.files import new_directory, sha256
from hyperlora.fingerprint import Fingerprint
from hyperlora.inject import Factors
from hyperlora.patch import Provenance, check_base

if TYPE_CHECKING:
    from hyperlora.layout import Rule

_WEIGHTS, _CONFIG = "shared.safetensors", "shared.json"


@dataclass(frozen=True)
class SharedState:
    """Not part of a memory, and counted apart.

    Attributes:
        name: of the method, with its settings.
        digest: hash of the tensors.
        adapter: LoRA factors per module path, A (1, rank, d_in) and B (1, d_out, rank).
        token_rows: input embeddings (new tokens, d_model) of the ids from the vocabulary's end on.
        gated: the adapter acts at new tokens only; else everywhere.
        extra_elements: numbers kept elsewhere, such as a hypernetwork's.
        rule: lays out every prompt with its context and its reply; None for ordinary text. Code, hence not saved.
        by_state: what the rule inserts behind a token of the reply depends on hidden states.
    """

    name: str
    digest: str = ""
    adapter: Factors | None = field(default=None, repr=False)
    token_rows: Tensor | None = field(default=None, repr=False)
    gated: bool = False
    extra_elements: int = 0
    rule: Rule | None = field(default=None, repr=False)
    by_state: bool = False

    @property
    def elements(self) -> int:
        adapter = sum(t.numel() for pair in (self.adapter or {}).values() for t in pair)
        return adapter + (0 if self.token_rows is None else self.token_rows.numel()) + self.extra_elements

    def save(self, path: Path, base: BaseModel, force: bool = False) -> None:
        """Write adapter and token rows to a directory, atomically."""
        tensors = {}
        for site, (a, b) in (self.adapter or {}).items():
            tensors[f"{site}.lora_A"], tensors[f"{site}.lora_B"] = a, b
        if self.token_rows is not None:
            tensors["token_rows"] = self.token_rows
        record = {
            "name": self.name,
            "gated": self.gated,
            "base": base.name,
            "fingerprint": vars(base.fingerprint),
        }
        with new_directory(path, _CONFIG, force) as folder:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / _WEIGHTS)
            (folder / _CONFIG).write_text(json.dumps(record, indent=1) + "\n")

    @staticmethod
    def load(path: Path, base: BaseModel) -> SharedState:
        """Read what `save` wrote.

        Raises:
            InputError: nothing there, or damaged.
            BaseMismatch: it was trained for another base.
        """
        try:
            record = json.loads((path / _CONFIG).read_text())
            origin = Provenance(record["base"], Fingerprint(**record["fingerprint"]))
            tensors = load_file(path / _WEIGHTS)
            digest = sha256((path / _WEIGHTS).read_bytes())[:16]
            rows = tensors.pop("token_rows", None)
            adapter = {
                name.removesuffix(".lora_A"): (tensor, tensors[name.removesuffix("A") + "B"])
                for name, tensor in tensors.items()
                if name.endswith(".lora_A")
            }
            name, gated = str(record["name"]), bool(record["gated"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no usable trained state ({str(error).splitlines()[0]})") from error
        check_base(origin, base.fingerprint, base.name)
        moved = {site: (a.to(base.device), b.to(base.device)) for site, (a, b) in adapter.items()}
        return SharedState(name, digest, moved or None, None if rows is None else rows.to(base.device), gated)
