"""The document in the prompt of an adapted model: the control for what training on the task's form alone gives.

A patch is trained on questions and their short answers; part of its gain over the bare model is that form. A LoRA of
like size, trained on the same questions with the document in the prompt and used for every document, has the form too.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method, MethodSettings
from hyperlora.prompt import document_ids
from hyperlora.shared_state import SharedState
from hyperlora.structure import Site


class AdaptedFull(Method):
    """The document in the prompt of the base with one LoRA for all documents, trained on the same questions."""

    name = "adapted_full"

    class Settings(MethodSettings):
        """`path`: directory of the trained adapter (`train/adapted_full.py` writes it); default the one that ships."""

        path: str | None = None

    def __init__(self, base: BaseModel, settings: Any, seed: int = 0):
        super().__init__(base, settings, seed)
        self.shared = SharedState.load(Path(settings.path) if settings.path else shipped_adapter(), base)

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        texts = [document_ids(self.base.tokenizer, document.text) for document in documents]
        return [Memory(text=tuple(ids), shared=self.shared) for ids in texts]

    def identity(self) -> dict[str, Any]:
        return {"adapter": self.shared.digest}


def shipped_adapter() -> Path:
    """The adapter for the default base; its card says beside which generator it was trained."""
    return Path(str(files("hyperlora") / "pretrained" / "adapted_full"))


def fresh_adapter(base: BaseModel, rank: int, sites: Sequence[Site], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's start (Hu et al. 2021): A (1, rank, d_in) random, B (1, d_out, rank) zero, trainable, for every site."""
    rng = torch.Generator().manual_seed(seed)
    return {
        site.path: (
            (torch.randn(1, rank, site.d_in, generator=rng) / site.d_in**0.5).to(base.device).requires_grad_(),
            torch.zeros(1, site.d_out, rank, device=base.device, requires_grad=True),
        )
        for site in sites
    }
