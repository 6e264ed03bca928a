"""Keys and values of a random part of the document: the floor for every method that selects."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, stable_seed
from hyperlora.methods.kv_cache import KVCache
from hyperlora.methods.truncation import token_budget


class RandomEviction(KVCache):
    """K/V of random document tokens, computed with the whole document in sight, at another method's resident bytes.

    The prompt's prefix always stays, because models use its first token as an attention sink.
    """

    name = "random_eviction"
    rival = None
    seeded = True
    budgeted = True

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        assert budgets is not None
        memories = []
        for document, whole, budget in zip(documents, super().compile(documents), budgets, strict=True):
            assert whole.kv is not None
            kept = torch.zeros(len(whole.kv.places), dtype=torch.bool)
            tokens = len(kept) - whole.kv.prefix
            rng = torch.Generator().manual_seed(stable_seed(self.seed, document.id))
            kept[whole.kv.prefix + torch.randperm(tokens, generator=rng)[: token_budget(self.base, budget)]] = True
            memories.append(replace(whole, kv=whole.kv.select(kept.to(self.base.device))))
        return memories
