"""The document's keys and values, computed once: what plain prefix caching does."""

from collections.abc import Sequence

import torch

from hyperlora.base_model import BaseModel
from hyperlora.memory import KV, Memory
from hyperlora.methods.contract import Document, Method
from hyperlora.prompt import document_ids, encode
from hyperlora.session import Session

_PIECE = 1024


class KVCache(Method):
    """Every layer's keys and values of the prompt up to the end of the document."""

    name = "kv_cache"

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory(kv=prefill(self.base, document.text)) for document in documents]


@torch.no_grad()
def prefill(base: BaseModel, text: str, kept: torch.Tensor | None = None) -> KV:
    """Keys and values of prompt prefix and document; `kept` (document tokens,) says which of the document's stay."""
    prefix = encode(base.tokenizer, base.prompt.prefix)
    ids = torch.tensor([prefix + document_ids(base.tokenizer, text)], device=base.device)
    places = torch.arange(ids.shape[1], device=base.device)[None]
    with Session(base, 1) as session:
        for start in range(0, ids.shape[1], _PIECE):
            piece = slice(start, start + _PIECE)
            where = places[:, piece]
            session.feed(ids[:, piece], where, where, torch.zeros_like(where, dtype=torch.bool))
        if kept is not None:
            always = torch.ones(len(prefix), dtype=torch.bool, device=base.device)
            session.keep(torch.cat([always, kept.to(base.device)])[None])
        return session.take(0)
