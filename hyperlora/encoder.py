"""Document -> tensors: the frozen base reads the document and what it computes on the way is kept."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.activations import stored
from hyperlora.attention import attention
from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.groups import cheapest_groups
from hyperlora.hypernet.contract import Features, Pair, Reading
from hyperlora.inject import inject
from hyperlora.prompt import document_ids, encode
from hyperlora.structure import Site, check_embeds, context_window, decoder_layers, hidden_of

_OVERLAP = 64  # tokens, a sentence or two
Timed = Callable[[], AbstractContextManager[None]]


class _Exit(Exception):
    """Raised inside the forward pass once the last needed layer has run."""


class Encoder:
    """Reads chunks of documents with the base model, stopping after the last layer that is asked for.

    A chunk starts with the prompt's first token, which models use as an attention sink; it is not part of the
    features. Chunks are padded on the right without a mask: under causal attention a real token never sees padding.
    Where the base runs flash-attention there is no padding: ragged chunks stand behind each other in one sequence, told
    apart by their positions.

    Args:
        sites: modules whose inputs are kept.
        chunk_tokens: longest piece of a document read at once; at most half the base's window.
        batch_tokens: chunks are read together up to this many padded tokens; default `groups.BATCH_TOKENS`.

    Attributes:
        packed: leave out the padding with any attention.
    """

    packed = False

    def __init__(self, base: BaseModel, sites: list[Site], chunk_tokens: int = 2048, batch_tokens: int | None = None):
        self.base = base
        self.sites = sites
        self.chunk_tokens = min(chunk_tokens, context_window(base.model) // 2)
        self.overlap = min(_OVERLAP, self.chunk_tokens // 4)
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
        """Split a document into equal chunks of at most `chunk_tokens`, each of which begins with the last `overlap`
        tokens of the one before: what stands at a bound, such as a name and what is said of it, is whole in one."""
        if len(ids) <= self.chunk_tokens:
            return [ids]
        distinct = len(ids) - self.overlap
        count = -(-distinct // (self.chunk_tokens - self.overlap))
        starts = [distinct * i // count for i in range(count + 1)]
        return [ids[a : b + self.overlap] for a, b in pairwise(starts)]

    def batches(self, chunks: Sequence[list[int]]) -> list[list[int]]:
        """Numbers of chunks to read together: of like length, so that there is little padding."""
        return cheapest_groups(list(map(len, chunks)), self.base.device, self.batch_tokens)

    def open(self, chunks: list[list[int]], timed: Timed = nullcontext) -> "ChunkReading":
        """A batch of chunks (token ids) to be read in the way that a hypernetwork asks for, inside `timed`."""
        return ChunkReading(self, chunks, timed)

    def read(self, chunks: list[list[int]], adapter: Mapping[str, Pair] | None = None) -> Features:
        """Features of a batch of chunks (token ids), one forward pass, with an adapter on and its gradient where there
        is one."""
        base = self.base
        ids, mask = self._padded(chunks)
        kept: dict[Any, Tensor] = {}
        handles = [
            base.model.get_submodule(site.path).register_forward_pre_hook(_keeper(kept, site.path))
            for site in self.sites
        ]
        middle = self._last // 2
        for layer in {0, middle}:
            handles.append(self._blocks[layer].register_forward_pre_hook(_keeper(kept, layer), with_kwargs=True))
        skip = len(self.sink)
        real = nn.functional.pad(mask, (skip, 0), value=True)
        try:
            with nullcontext() if adapter else torch.no_grad(), inject(base.model, adapter or {}), stored(self._blocks):
                kept |= self._until_the_last([self._last], real, input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
        kept = {key: _spread(states, real) for key, states in kept.items()}
        ids = ids[:, skip:]
        table = base.model.get_output_embeddings().weight
        words = nn.functional.normalize(table[ids].float(), dim=-1) * mask[..., None]  # (chunks, tokens, d_model)
        following = torch.cat([words[:, 1:], torch.zeros_like(words[:, :1])], dim=1)
        return Features(
            inputs=[kept[site.path][:, skip:].float() for site in self.sites],
            hidden=torch.stack([kept[key][:, skip:].float() for key in (0, middle, _behind(self._last))], dim=2),
            words=words,
            following=following,
            mask=mask,
        )

    def memory(
        self, chunks: list[list[int]], tokens: Tensor, adapter: Mapping[str, Pair], layers: Sequence[int]
    ) -> Tensor:
        """See `Reading.memory`. The tokens stand right behind a chunk's own, before any padding.

        Raises:
            UnsupportedBase: a base that wants token ids.
        """
        check_embeds(self.base.model)
        ids, mask = self._padded(chunks)
        skip, count = len(self.sink), len(tokens)
        begin = skip + mask.sum(1)  # (chunks,) where the tokens start
        embeds = self.base.model.get_input_embeddings()(ids)
        # As large as the chunk's own embeddings, whatever else stands in the batch.
        energy = embeds[:, skip:].float().square().mean(-1) * mask
        size = (energy.sum(1) / mask.sum(1)).sqrt()
        embeds = nn.functional.pad(embeds, (0, 0, 0, count))
        places = begin[:, None] + torch.arange(count, device=ids.device)  # (chunks, count)
        rows = torch.arange(len(chunks), device=ids.device)[:, None]
        embeds = embeds.index_put((rows, places), (size[:, None, None] * tokens).to(embeds.dtype))
        real = torch.arange(embeds.shape[1], device=ids.device) < begin[:, None] + count
        with inject(self.base.model, adapter), stored(self._blocks):
            kept = self._until_the_last(layers, real, inputs_embeds=embeds)
        behind = [_spread(kept[_behind(layer)], real)[rows, places].float() for layer in layers]
        return torch.stack(behind, dim=1)

    def _padded(self, chunks: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (chunks, sink and tokens) and mask (chunks, tokens)."""
        width = max(map(len, chunks))
        ids = torch.zeros(len(chunks), len(self.sink) + width, dtype=torch.long)
        mask = torch.zeros(len(chunks), width, dtype=torch.bool)
        for row, chunk in enumerate(chunks):
            ids[row, : len(self.sink) + len(chunk)] = torch.tensor(self.sink + chunk)
            mask[row, : len(chunk)] = True
        return ids.to(self.base.device), mask.to(self.base.device)

    @cached_property
    def _tells_apart(self) -> bool:
        """Whether the base keeps packed sequences apart: not one that loses their positions on the way to attention
        (GPTBigCode, Persimmon, CTRL), in which a sequence would see the one before it."""
        ids = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]], device=self.base.device)  # two sequences, the second the same
        positions = torch.tensor([[0, 1, 0, 1]], device=self.base.device)
        with torch.no_grad(), inject(self.base.model, {}), stored(self._blocks):
            one, other = (
                self._kept([0], input_ids=row[None], position_ids=positions)[_behind(0)][0, 2:].float() for row in ids
            )
        return bool((one - other).norm() < 1e-2 * one.norm())

    def _until_the_last(self, layers: Sequence[int], real: Tensor, **inputs: Tensor) -> dict[Any, Tensor]:
        """Run the base up to its last layer that matters; what is behind `layers`, by `_behind`.

        `inputs` are padded; where they are packed, as `real` (chunks, tokens) says, so is what comes back.
        """
        if len(real) > 1 and (self.packed or self.base.attention.startswith("flash")) and self._tells_apart:
            positions = torch.arange(real.shape[1], device=real.device).expand_as(real)
            inputs = {name: padded[real][None] for name, padded in (inputs | {"position_ids": positions}).items()}
        return self._kept(layers, **inputs)

    def _kept(self, layers: Sequence[int], **inputs: Tensor) -> dict[Any, Tensor]:
        """What the base has behind `layers` when it reads `inputs` up to the last of them."""
        kept: dict[Any, Tensor] = {}

        def keep(layer: int, _: nn.Module, __: Any, output: Any) -> None:
            kept[_behind(layer)] = hidden_of(output)
            if layer == max(layers):
                raise _Exit

        handles = [self._blocks[layer].register_forward_hook(partial(keep, layer)) for layer in layers]
        try:
            with attention(self.base, next(iter(inputs.values())).shape[1]):
                self._inner(**inputs, use_cache=False)
        except _Exit:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return kept


class ChunkReading(Reading):
    """Chunks for a hypernetwork; see `Encoder`."""

    def __init__(self, encoder: Encoder, chunks: list[list[int]], timed: Timed):
        self._encoder, self._chunks, self._timed = encoder, chunks, timed

    @cached_property
    def features(self) -> Features:
        with self._timed():
            return self._encoder.read(self._chunks)

    def adapted(self, adapter: Mapping[str, Pair]) -> Features:
        with self._timed():
            return self._encoder.read(self._chunks, adapter)

    def memory(self, tokens: Tensor, adapter: Mapping[str, Pair], layers: Sequence[int]) -> Tensor:
        with self._timed():
            return self._encoder.memory(self._chunks, tokens, adapter, layers)


def _spread(states: Tensor, real: Tensor) -> Tensor:
    """(chunks, tokens, d) again where `states` (1, real tokens, d) are packed, zero at padding."""
    if len(states) == len(real):
        return states
    return states.new_zeros(*real.shape, states.shape[-1]).index_put(real.nonzero(as_tuple=True), states[0])


def _behind(layer: int) -> str:
    return f"behind {layer}"


def _keeper(kept: dict[Any, Tensor], key: Any) -> Any:
    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        kept[key] = args[0] if args else (kwargs or {})["hidden_states"]

    return keep
