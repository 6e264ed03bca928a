"""Memory tokens: the base itself reads the document with extra tokens after it, whose hidden states become the patch.

The family of SHINE (2026): the base with a trainable LoRA of its own reads the document and the learned tokens; a small
transformer that looks across layers and across tokens in turn goes over the tokens' hidden states; what it makes of
those behind a layer is cut into A and B of the layer's sites, without a head. The cost is a prefill of the document and
the tokens with the LoRA on, forward and backward.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from hyperlora.hypernet.adapter import adapter_factors, adapter_parameters
from hyperlora.hypernet.blocks import Block
from hyperlora.hypernet.contract import Hypernet, Pair, Reading, Shape
from hyperlora.hypernet.units import in_units
from hyperlora.statistics import SiteStatistics


class MemoryTokens(Hypernet):
    """Hidden states of memory tokens behind a layer, reshaped into the ranks of its sites.

    There are as many tokens as it takes to hold the numbers of the largest layer: `rank` times d_in + d_out of its
    sites, d_model numbers to a token. The numbers have size about 1 and are brought into the units of a site
    (units.py) with a learned `output_scale` per rank.

    Args:
        shape: each site writes into the residual stream (d_out = `d_model`).
        rank: of what a chunk writes, per site.
        depth, heads: of the transformer, whose width is d_model; an even `depth`, layers and tokens in turn.
        adapter_rank: of the LoRA that is on while the base reads, on all linear modules up to the last site's layer.
        scale: initial `output_scale`.
    """

    name = "memory_tokens"
    strengths = ("output_scale",)

    def __init__(
        self,
        shape: Shape,
        *,
        rank: int = 16,
        depth: int = 4,
        heads: int = 8,
        adapter_rank: int = 32,
        scale: float = 0.01,
    ):
        super().__init__()
        self.check(shape, shape.d_model, heads, rank=(rank, 1), depth=(depth, 2), adapter_rank=(adapter_rank, 1))
        if depth % 2:
            raise self.refuse(f"depth ({depth}) must be even: one block across layers, one across tokens")
        if scale <= 0:
            raise self.refuse(f"scale ({scale}) must be positive")
        self.rank = rank
        self.layers = sorted({site.layer for site in shape.sites})
        # Of every layer the sites with their places in `shape.sites`.
        self.members = [[(n, s) for n, s in enumerate(shape.sites) if s.layer == layer] for layer in self.layers]
        numbers = max(rank * sum(site.d_in + site.d_out for _, site in members) for members in self.members)
        count = math.ceil(numbers / shape.d_model)
        self.tokens = nn.Parameter(torch.randn(count, shape.d_model))
        self.linears, self.adapter_rank = shape.linears, adapter_rank
        self.adapter_a, self.adapter_b = adapter_parameters(shape.linears, adapter_rank)
        self.layer = nn.Parameter(0.1 * torch.randn(len(self.layers), 1, shape.d_model))
        self.place = nn.Parameter(0.1 * torch.randn(count, shape.d_model))
        self.blocks = nn.ModuleList(Block(shape.d_model, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(shape.d_model)
        self.output_scale = nn.Parameter(torch.full((len(shape.sites), rank), scale))

    def forward(self, reading: Reading, statistics: Sequence[SiteStatistics]) -> list[Pair]:
        adapter = adapter_factors(self.linears, self.adapter_rank, self.adapter_a, self.adapter_b)
        z = reading.memory(self.tokens, adapter, self.layers)  # (documents, layers, tokens, d_model)
        z = F.rms_norm(z, z.shape[-1:]) + self.layer + self.place
        for across_layers, across_tokens in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            layers, tokens = z.shape[1:3]
            z = across_layers(rearrange(z, "b l t d -> (b t) l d"))
            z = across_tokens(rearrange(z, "(b t) l d -> (b l) t d", t=tokens))
            z = rearrange(z, "(b l) t d -> b l t d", l=layers)
        written = rearrange(self.norm(z), "b l t d -> b l (t d)")
        factors: dict[int, Pair] = {}
        for row, members in enumerate(self.members):
            sizes = [self.rank * width for _, site in members for width in (site.d_in, site.d_out)]
            parts = iter(written[:, row, : sum(sizes)].split(sizes, dim=-1))
            for number, site in members:
                n, m = (next(parts).unflatten(-1, (self.rank, width)) / width**0.5 for width in (site.d_in, site.d_out))
                factors[number] = in_units(n, m, self.output_scale[number], statistics[number])
        return [factors[number] for number in range(len(factors))]
