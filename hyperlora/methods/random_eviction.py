"""Keys and values of a random part of the document: the floor for every method that selects."""

from collections.abc import Sequence

import torch

from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, Method, stable_seed
from hyperlora.methods.kv_cache import prefill
from hyperlora.methods.truncation import token_budget
from hyperlora.prompt import document_ids, encode


class RandomEviction(Method):
    """K/V of random document tokens, computed with the whole document in sight, at another method's resident bytes.

    The prompt's prefix always stays, because models use its first token as an attention sink.
    """

    name = "random_eviction"
    seeded = True
    budgeted = True

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        assert budgets is not None
        prefix = len(encode(self.base.tokenizer, self.base.prompt.prefix))
        memories = []
        for document, budget in zip(documents, budgets, strict=True):
            tokens = len(document_ids(self.base.tokenizer, document.text))
            count = min(tokens, max(1, token_budget(self.base, budget) - prefix))
            rng = torch.Generator().manual_seed(stable_seed(self.seed, document.id))
            kept = torch.zeros(tokens, dtype=torch.bool)
            kept[torch.randperm(tokens, generator=rng)[:count]] = True
            memories.append(Memory(kv=prefill(self.base, document.text, kept)))
        return memories
