"""An associative memory written into the weights: one or two (key, value) slots per document token and site.

Keys follow the closed-form model editors (ROME, Meng et al. 2022, arXiv 2202.05262; MEMIT, arXiv 2210.07229): for
module inputs X (tokens, d_in) at the document's tokens, values V and the second moment C of generic text, the update
that minimises |V - X W|^2 + ridge * tr(W^T C W) is W = K^T V with keys K = (X C^-1 X^T + ridge)^-1 X C^-1. Each key
answers to its own token, little to the document's other tokens, and hardly to unrelated text. Values are directions
of the residual stream that raise a token's logit, plus a learned part. Untrained, the copy slots already store
much of the document (eval/bench/keys.py measures it); training adjusts what is stored, how strongly and under which
key.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.hypernet.adapter import adapter_factors, adapter_parameters
from hyperlora.hypernet.blocks import Block
from hyperlora.hypernet.contract import Features, Hypernet, Pair, Reading, Shape, Written
from hyperlora.hypernet.slots import Slots, added, solved
from hyperlora.rank_cap import cap_ranks
from hyperlora.statistics import SecondMoment, SiteStatistics

_ALPHA = 2.5  # of the adapter, which learns too slowly at the rate of the rest


class Associative(Hypernet):
    """Copy slots and pointer slots over a small bidirectional transformer, and an adapter that reads and answers.

    For site input x_t, hidden state z_t of the small transformer, unit unembedding e, residual size |h|, strength
    g = reach * sigmoid(w z_t) and shifts d, d' that a small network makes of x_t and z_t:

    - copy: keys from x_t + d, values g |h| (c * e(t+1) + W z_t): after t comes t+1. d is how the input differs where
      a reply says the same in other words, and without the document before it.
    - pointer: keys from W_k z_t + d', values g' |h| (c' * e(t) + W' z_t): a place predicted from the document, such
      as the end of a question, selects t.

    The adapter is a LoRA on what reads the residual stream in attention, the same for all documents. It is on while the
    base reads a document and part of every patch: it learns to have a place of the document and the place where a reply
    needs it say in the same way which fact is meant. Names are hardly told apart without it (docs/research.md).

    Inputs have d_in dimensions, so where a document has many more tokens the regression can answer few of them. With
    `salience` both its inputs and its values are multiplied by 2 sigmoid(u z_t): it becomes a weighted one, which minds
    the tokens that are likely to be asked for.

    Args:
        shape: each site writes into the residual stream (d_out = `d_model`).
        width, depth, heads: of the transformer behind z.
        copy_scale, pointer_scale: initial c and c'.
        pointers: pointer slots of one document, at its strongest tokens; 0 for none.
        reach: the largest strength of a slot; a copy slot starts at 1. Above 1, a word that the base finds unlikely can
            outweigh what the base would rather say.
        moves: width of the network behind d and d'; 0 for none.
        ridge: initial ridge of the keys, in units of E[x^T C^-1 x] = d_in; learned per site.
        adapter_rank: of the adapter; 0 for none.
        salience: let tokens count for more and for less, equally at first.
    """

    name = "associative"
    strengths = (".scale",)

    def __init__(
        self,
        shape: Shape,
        *,
        width: int = 320,
        depth: int = 2,
        heads: int = 5,
        pointers: int = 128,
        copy_scale: float = 0.25,
        pointer_scale: float = 0.035,
        reach: float = 4.0,
        moves: int = 128,
        ridge: float = 0.3,
        adapter_rank: int = 4,
        salience: bool = False,
    ):
        super().__init__()
        none = {"depth": depth, "pointers": pointers, "moves": moves, "adapter_rank": adapter_rank}
        self.check(shape, width, heads, **{name: (value, 0) for name, value in none.items()})
        if ridge <= 0:
            raise self.refuse(f"ridge ({ridge}) must be positive")
        if reach <= 1:
            raise self.refuse(f"reach ({reach}) must be greater than 1")
        sites, d_model = shape.sites, shape.d_model
        self.pointers = pointers
        self.mix = nn.Linear(4 * d_model, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.copy = nn.ModuleList(Value(width, d_model, copy_scale, 1.0, reach) for _ in sites)
        self.point = nn.ModuleList(Value(width, d_model, pointer_scale, 0.2, reach) for _ in sites if pointers)
        self.aim = nn.ModuleList(nn.Linear(width, site.d_in) for site in sites if pointers)
        self.move = nn.ModuleList(_Move(width, moves, site.d_in, bool(pointers)) for site in sites if moves)
        self.salience = nn.Linear(width, 1) if salience else None
        if self.salience:
            nn.init.zeros_(self.salience.weight)
            nn.init.zeros_(self.salience.bias)
        self.log_ridge = nn.Parameter(torch.full((len(sites), 2), math.log(ridge)))
        self.fixed_rank = adapter_rank
        if adapter_rank:
            self.fixed = [module for module in shape.attention if module not in sites]
            self.adapter_a, self.adapter_b = adapter_parameters(self.fixed, adapter_rank)

    def forward(self, reading: Reading, statistics: Sequence[SiteStatistics]) -> list[Written]:
        adapter: dict[str, Pair] = {}
        if self.fixed:
            adapter = adapter_factors(self.fixed, self.fixed_rank, self.adapter_a, self.adapter_b, _ALPHA)
        features = reading.adapted(adapter) if adapter else reading.features
        z = self._read(features)
        written: list[Written] = []
        for index, (x, stat) in enumerate(zip(features.inputs, statistics, strict=True)):
            written.append(tuple(self.slots(index, x, z, features, stat)))
        return written + list(adapter.values())

    def slots(self, index: int, x: Tensor, z: Tensor, features: Features, stat: SiteStatistics) -> list[Slots]:
        """Groups of slots of one site, which compete within their group; x (documents, tokens, d_in) its inputs and z
        (documents, tokens, width)."""
        counts = features.mask[..., None].float()
        if self.salience:
            counts = counts * 2 * torch.sigmoid(self.salience(z))
        ridge, spread = self.log_ridge[index].exp(), stat.moment.spread()
        move: Any = self.move[index] if len(self.move) else None
        if move:
            hidden = move(x, z, spread)
            x = x + move.to_copies(hidden, spread)
        size = stat.residual_norm / stat.gain
        slots = [Slots(x * counts, self.copy[index](z, features.following) * counts * size, ridge[0])]
        if len(self.aim):
            point = self.point[index]
            assert isinstance(point, Value)
            tokens = strongest(point.strength(z) * counts, features.mask, self.pointers)
            at, words, kept = (t.take_along_dim(tokens, dim=1) for t in (z, features.words, counts))
            x = self.aim[index](at)
            if move:
                x = x + move.to_pointers(hidden.take_along_dim(tokens, dim=1), spread)
            slots.append(Slots(typical(x * (kept > 0), stat.moment) * kept, point(at, words) * kept * size, ridge[1]))
        return slots

    def factors(self, written: Sequence[Written], statistics: Sequence[SiteStatistics], rank: int) -> list[Pair]:
        return cap_ranks([solved(w, stat.moment) for w, stat in zip(written, statistics, strict=True)], rank)

    def join(self, written: Written, more: Written, statistics: SiteStatistics, rank: int) -> Written:
        return added(written, more)

    def _read(self, features: Features) -> Tensor:
        """z (documents, tokens, width)."""
        hidden = F.rms_norm(features.hidden, features.hidden.shape[-1:])
        # The next token's embedding: what a copy slot stores, which causal hidden states cannot know.
        following = F.pad(hidden[:, 1:, 0] * features.mask[:, 1:, None], (0, 0, 0, 1))
        z = self.mix(torch.cat([rearrange(hidden, "b t k d -> b t (k d)"), following], dim=-1))
        for block in self.blocks:
            z = block(z, features.mask)
        return self.norm(z)


def strongest(strength: Tensor, mask: Tensor, count: int) -> Tensor:
    """The `count` tokens of most `strength` (documents, tokens, 1), in document order; padding only where there are not
    enough. Returns their places (documents, count or fewer, 1). Among equals the earlier wins."""
    ranked = strength.squeeze(-1).masked_fill(~mask, -1.0).argsort(dim=1, descending=True, stable=True)
    return ranked[:, :count].sort(dim=1).values[..., None]


def typical(x: Tensor, moment: SecondMoment) -> Tensor:
    """Inputs x (documents, slots, d_in) made as large as a typical one, x^T C^-1 x = d_in; zero stays zero."""
    return x * (x.shape[-1] / (moment.solve(x) * x).sum(-1, keepdim=True).clamp_min(1e-6)).sqrt()


class Value(nn.Module):
    """g (c * e + W z), (documents, tokens, d_model); c is a scale per channel, W starts at zero, g at `strength`.

    W z is multiplied by `step`, so that the first optimizer steps move it by a fraction of c and not by many times c.
    """

    def __init__(self, width: int, d_model: int, scale: float, strength: float, reach: float):
        super().__init__()
        self.reach, self.step = reach, 0.1 / width**0.5
        self.scale = nn.Parameter(torch.full((d_model,), scale))
        self.learned = nn.Linear(width, d_model, bias=False)
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.learned.weight)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, math.log(strength / (reach - strength)))

    def strength(self, z: Tensor) -> Tensor:
        """g (documents, tokens, 1)."""
        return self.reach * torch.sigmoid(self.gate(z))

    def forward(self, z: Tensor, words: Tensor) -> Tensor:
        return self.strength(z) * (self.scale * words + self.step * self.learned(z))


class _Move(nn.Module):
    """gelu(V x / spread + W z), from which `to_copies` and `to_pointers` make the shifts of the keys; `spread` (d_in,)
    is the size of the input's channels."""

    def __init__(self, width: int, hidden: int, d_in: int, pointers: bool):
        super().__init__()
        self.own, self.around = nn.Linear(d_in, hidden), nn.Linear(width, hidden, bias=False)
        self.to_copies = _Shift(hidden, d_in)
        if pointers:
            self.to_pointers = _Shift(hidden, d_in)

    def forward(self, x: Tensor, z: Tensor, spread: Tensor) -> Tensor:
        """(documents, tokens, hidden)."""
        return F.gelu(self.own(x / spread) + self.around(z))


class _Shift(nn.Module):
    """U hidden * spread, (documents, tokens, d_in), zero at first."""

    def __init__(self, hidden: int, d_in: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_in, hidden))

    def forward(self, hidden: Tensor, spread: Tensor) -> Tensor:
        return F.linear(hidden, spread[:, None] * self.weight)
