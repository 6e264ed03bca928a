"""A batch of sequences inside the base model: fed piece by piece, seeing what they are told to see, freeing K/V."""

from __future__ import annotations

from contextlib import ExitStack
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.growing_cache import growing_cache
from hyperlora.inject import Factors, TokenGate, inject
from hyperlora.objectives import only_positions
from hyperlora.shared_state import SharedState
from hyperlora.structure import UnsupportedBase, check_embeds, text_config

if TYPE_CHECKING:
    from hyperlora.memory import KV


_MASKED = ("sdpa", "eager")


class Session:
    """What the base model remembers of a batch of sequences; used as a context manager, because patches and the shared
    adapter are on inside the block.

    Every cached row of K/V knows the place of its token in the sequence (`places`, -1 where a row is empty) and the
    absolute position it was computed at (`positions`), so that dropping rows changes neither. Masks are built from
    both, one per layer type: a sliding window counts positions, not rows. `hidden` are the final hidden states (rows,
    tokens, d_model) of what was fed last, as the output layer sees them.

    Args:
        rows: sequences in the batch.
        factors, patch_rows: patches, one per sequence; see `inject`.
        shared: trained state that all sequences share; its adapter acts where the gate says.
        cached: keep K/V for later pieces; False for a single pass under activation checkpointing.

    Raises:
        UnsupportedBase: attention that is neither full nor a sliding window, or a base that takes no positions or
            wants token ids.
    """

    def __init__(
        self,
        base: BaseModel,
        rows: int,
        *,
        factors: Factors | None = None,
        patch_rows: Tensor | None = None,
        shared: SharedState | None = None,
        cached: bool = True,
    ):
        self.base, self.shared, self.rows = base, shared, rows
        self._factors, self._patch_rows = factors, patch_rows
        check_embeds(base.model)
        self._windows = attention_windows(base)
        self._cache: Any = growing_cache() if cached else None
        # Models with code of their own, and transformers before 5.24, say `past_key_values`.
        known = signature(base.model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        if not _takes_positions(base):
            kind = text_config(base.model).model_type
            raise UnsupportedBase(
                f"{kind} cannot be told the positions of its tokens, which memories keep; use a base with rotary or "
                "learned positions"
            )
        self._gate = TokenGate()
        self._block = ExitStack()
        self.places = torch.empty(rows, 0, dtype=torch.long, device=base.device)
        self.positions = torch.empty(rows, 0, dtype=torch.long, device=base.device)
        # Where each sequence goes on, whatever is freed.
        self.next_place = torch.zeros(rows, dtype=torch.long, device=base.device)
        self.next_position = torch.zeros(rows, dtype=torch.long, device=base.device)
        self.hidden = torch.empty(rows, 0, 0, device=base.device)

    def __enter__(self) -> Session:
        self._used = self.base.attention
        if self._used not in _MASKED:  # flash-attention takes no masks of our own
            self.base.model.set_attn_implementation("sdpa")
        self._inject()
        return self

    def _inject(self) -> None:
        if self._factors:
            self._block.enter_context(inject(self.base.model, self._factors, self._patch_rows))
        if self.shared and self.shared.adapter:
            self._block.enter_context(inject(self.base.model, self.shared.adapter, gate=self._gate))

    def __exit__(self, *_: object) -> None:
        self._block.close()
        if self._used not in _MASKED:
            self.base.model.set_attn_implementation(self._used)

    # -- the cache ----------------------------------------------------------------------------------------------------

    @property
    def kv_rows(self) -> int:
        """Rows of K/V held per layer, padding included."""
        return self.places.shape[1]

    def load(self, memories: list[KV]) -> None:
        """Start from stored keys and values, one memory per sequence, ragged ones padded on the left."""
        width = max(memory.positions.numel() for memory in memories)
        device = self.base.device
        self.places = torch.full((self.rows, width), -1, dtype=torch.long, device=device)
        self.positions = torch.zeros(self.rows, width, dtype=torch.long, device=device)
        self.next_place = torch.tensor([memory.next_place for memory in memories], device=device)
        self.next_position = torch.tensor([memory.next_position for memory in memories], device=device)
        for row, memory in enumerate(memories):
            kept = memory.positions.numel()
            self.places[row, width - kept :] = memory.places.to(device)
            self.positions[row, width - kept :] = memory.positions.to(device)
        for layer in range(len(memories[0].keys)):
            stacked = []
            for name in ("keys", "values"):
                parts = [getattr(memory, name)[layer].to(device, self.base.model.dtype) for memory in memories]
                padded = [torch.nn.functional.pad(part, (0, 0, width - part.shape[1], 0)) for part in parts]
                stacked.append(torch.stack(padded))  # (rows, kv_heads, width, head_dim)
            self._cache.update(*stacked, layer)

    def take(self, row: int, prefix: int = 0, following: Tensor | None = None) -> KV:
        """The keys and values of one sequence, as they can be stored; see `KV` for the arguments."""
        from hyperlora.memory import KV

        held = self.places[row] >= 0
        layers = self._cache.layers
        return KV(
            keys=[layer.keys[row][:, held].clone() for layer in layers],
            values=[layer.values[row][:, held].clone() for layer in layers],
            places=self.places[row][held].clone(),
            positions=self.positions[row][held].clone(),
            next_place=int(self.next_place[row]),
            next_position=int(self.next_position[row]),
            prefix=prefix,
            following=following,
        )

    def keep(self, kept: Tensor) -> None:
        """Free the rows of K/V for which `kept` (rows, kv_rows) is False; tensors shrink to the fullest sequence."""
        kept = kept & (self.places >= 0)
        width = int(kept.sum(1).max())
        # Kept rows first, in their order; then whatever fills up the shorter sequences.
        order = torch.argsort(~kept, dim=1, stable=True)[:, :width]
        filled = kept.gather(1, order)
        self.places = self.places.gather(1, order).masked_fill(~filled, -1)
        self.positions = self.positions.gather(1, order)
        for layer in self._cache.layers:
            index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)

    def only(self, chosen: Tensor) -> None:
        """Go on with the sequences of these numbers (long), in this order, and forget the others."""
        self.rows = len(chosen)
        for name in ("places", "positions", "next_place", "next_position"):
            setattr(self, name, getattr(self, name)[chosen])
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]
        if self._factors and self._patch_rows is not None:
            self._patch_rows = self._patch_rows[chosen]
            self._block.close()
            self._inject()

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (..., d_model) of token ids; ids beyond the vocabulary are the shared state's new tokens."""
        table = self.base.model.get_input_embeddings()
        if self.shared is None or self.shared.token_rows is None:
            return table(ids)
        first = table.num_embeddings
        embedded = table(ids.clamp(max=first - 1))
        new = self.shared.token_rows.to(embedded)[(ids - first).clamp(min=0)]
        return torch.where((ids >= first)[..., None], new, embedded)

    def feed(
        self,
        inputs: Tensor,
        places: Tensor,
        positions: Tensor,
        wanted: Tensor,
        *,
        visible: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Read more of every sequence and return the logits at the `wanted` tokens.

        Args:
            inputs: embeddings (rows, tokens, d_model) or ids (rows, tokens).
            places: (rows, tokens) place of each token in its sequence, -1 for padding.
            positions: (rows, tokens) absolute positions.
            wanted: (rows, tokens) bool.
            visible: (rows, tokens, kv_rows + tokens) bool, who may see whom among the cached rows and these tokens;
                default all. Later places, padding and what a layer's window excludes are never seen.
            gate: (rows, tokens) scale of the shared adapter; default 1 everywhere.

        Returns:
            (wanted tokens, vocabulary), float32, in row order.
        """
        embedded = self.embed(inputs) if inputs.dtype == torch.long else inputs.to(self.base.model.dtype)
        before = self.kv_rows
        self.places = torch.cat([self.places, places], dim=1)
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.next_place = torch.maximum(self.next_place, places.amax(1) + 1)
        self.next_position = torch.maximum(self.next_position, torch.where(places >= 0, positions, -1).amax(1) + 1)
        seen = (self.places[:, None, :] <= places[:, :, None]) & (self.places[:, None, :] >= 0)
        if visible is not None:
            seen = seen & visible
        tokens = places.shape[1]
        # A row that sees nothing gives NaN: padding sees itself.
        itself = torch.zeros_like(seen[0])
        itself[:, before:] = torch.eye(tokens, dtype=torch.bool, device=seen.device)
        self._gate.value = gate
        with only_positions(self.base.model, wanted) as found:
            output = self.base.model(
                inputs_embeds=embedded,
                attention_mask=self._masks(seen, positions, itself & (places < 0)[:, :, None]),
                position_ids=positions,
                use_cache=self._cache is not None,
                **{self._cache_name: self._cache},
            )
        (self.hidden,) = found
        return output.logits.float()

    def _masks(self, seen: Tensor, positions: Tensor, itself: Tensor) -> Any:
        """Additive masks (rows, 1, tokens, kv_rows), by layer type where there is more than one."""
        dtype = self.base.model.dtype
        masks = {}
        for kind, window in self._windows.items():
            allowed = seen
            if window is not None:
                allowed = seen & (positions[:, :, None] - self.positions[:, None, :] < window)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            masks[kind] = mask.masked_fill(~(allowed | itself), torch.finfo(dtype).min)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _takes_positions(base: BaseModel) -> bool:
    """Not those that weigh distances in the cache (ALiBi), whether they say so or take none."""
    alibi = getattr(text_config(base.model), "alibi", False)
    return not alibi and "position_ids" in signature(base.model.forward).parameters


def takes_masks(base: BaseModel) -> bool:
    """Whether a session can run the base, and with the attention that it has."""
    try:
        check_embeds(base.model)
        attention_windows(base)
    except UnsupportedBase:
        return False
    return base.attention in _MASKED and _takes_positions(base)


def attention_windows(base: BaseModel) -> dict[str, int | None]:
    """The window in positions (None: unlimited) of every kind of attention layer.

    Raises:
        UnsupportedBase: an attention pattern that is neither full nor a sliding window.
    """
    config = text_config(base.model)
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedBase(f"{config.model_type} has {', '.join(sorted(unknown))}; comparison needs full or sliding")
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
