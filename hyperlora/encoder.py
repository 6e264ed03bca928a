"""Document -> tensors: the frozen base reads the document and what it computes on the way is kept."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.hypernet.contract import Features
from hyperlora.prompt import document_ids, encode
from hyperlora.structure import Site, decoder_layers


class _Exit(Exception):
    """Raised inside the forward pass once the last needed layer has run."""


class Encoder:
    """Reads chunks of documents with the base model, stopping after the last layer that is asked for.

    A chunk starts with the prompt's first token, which models use as an attention sink; it is not part of the
    features. Chunks are padded on the right without a mask: under causal attention a real token never sees padding.

    Args:
        sites: modules whose inputs are kept.
        chunk_tokens: longest piece of a document read at once.
        batch_tokens: chunks are read together up to this many padded tokens.
    """

    def __init__(self, base: BaseModel, sites: list[Site], chunk_tokens: int = 512, batch_tokens: int = 2048):
        self.base = base
        self.sites = sites
        self.chunk_tokens = chunk_tokens
        self.batch_tokens = batch_tokens
        self._inner, self._blocks = base.model.base_model, decoder_layers(base.model)[1]
        self._last = max(site.layer for site in sites)
        tokenizer = base.tokenizer
        prefix = encode(tokenizer, base.prompt.prefix)
        self.sink = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else prefix[:1]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a document. Raises InputError when it is too short to say anything."""
        ids = document_ids(self.base.tokenizer, text)
        if len(ids) < 2:
            raise InputError(f"the document has {len(ids)} token(s); it needs at least two")
        return ids

    def chunks(self, ids: list[int]) -> list[list[int]]:
        """Split a document into equal chunks of at most `chunk_tokens`."""
        count = -(-len(ids) // self.chunk_tokens)
        bounds = [len(ids) * i // count for i in range(count + 1)]
        return [ids[a:b] for a, b in pairwise(bounds)]

    def batches(self, chunks: list[list[int]]) -> Iterator[list[list[int]]]:
        """Consecutive chunks whose padded size stays within `batch_tokens` (at least one chunk each)."""
        batch: list[list[int]] = []
        for chunk in chunks:
            if batch and max(map(len, [*batch, chunk])) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(chunk)
        if batch:
            yield batch

    @torch.no_grad()
    def read(self, chunks: list[list[int]]) -> Features:
        """Features of a batch of chunks (token ids), one forward pass."""
        base, device = self.base, self.base.device
        width = max(map(len, chunks))
        ids = torch.zeros(len(chunks), width, dtype=torch.long)
        mask = torch.zeros(len(chunks), width, dtype=torch.bool)
        for row, chunk in enumerate(chunks):
            ids[row, : len(chunk)] = torch.tensor(chunk)
            mask[row, : len(chunk)] = True
        ids, mask = ids.to(device), mask.to(device)
        sink = torch.tensor(self.sink, device=device, dtype=torch.long).expand(len(chunks), -1)
        kept: dict[Any, Tensor] = {}
        handles = [
            base.model.get_submodule(site.path).register_forward_pre_hook(_keeper(kept, site.path))
            for site in self.sites
        ]
        middle = self._last // 2
        for layer in {0, middle}:
            handles.append(self._blocks[layer].register_forward_pre_hook(_keeper(kept, layer), with_kwargs=True))

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            kept["last"] = output[0] if isinstance(output, tuple) else output
            raise _Exit

        handles.append(self._blocks[self._last].register_forward_hook(leave))
        try:
            self._inner(input_ids=torch.cat([sink, ids], dim=1), use_cache=False)
        except _Exit:
            pass
        finally:
            for handle in handles:
                handle.remove()
        skip = sink.shape[1]
        table = base.model.get_output_embeddings().weight
        words = nn.functional.normalize(table[ids].float(), dim=-1) * mask[..., None]  # (chunks, tokens, d_model)
        following = torch.cat([words[:, 1:], torch.zeros_like(words[:, :1])], dim=1)
        return Features(
            inputs=[kept[site.path][:, skip:].float() for site in self.sites],
            hidden=torch.stack([kept[key][:, skip:].float() for key in (0, middle, "last")], dim=2),
            words=words,
            following=following,
            mask=mask,
        )


def _keeper(kept: dict[Any, Tensor], key: Any) -> Any:
    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        kept[key] = args[0] if args else (kwargs or {})["hidden_states"]

    return keep
