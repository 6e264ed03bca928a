"""An associative memory with a perceiver's latents: what single tokens store, and slots made of the whole document.

The slots of `Associative` belong to one token each. Here a few learned latents per site read the document by
cross-attention as well (Jaegle et al. 2021, arXiv 2103.03206), and each becomes one more slot: its key is what the
latent says, its value the mean of the words that it points at (Vinyals et al. 2015, arXiv 1506.03134) and a learned
part. The latents' slots are a group of their own in the regression, and whatever the document's length their number is
the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.hypernet.associative import Associative, Value, typical
from hyperlora.hypernet.blocks import Block, CrossAttention
from hyperlora.hypernet.contract import Features, Shape
from hyperlora.hypernet.slots import Slots
from hyperlora.statistics import SiteStatistics


class Hybrid(Associative):
    """Copy, pointer and latent slots.

    Args:
        shape: each site writes into the residual stream (d_out = `d_model`).
        latents: latent slots of a site for each chunk.
        width, heads: as of `Associative`, for the latents too.
        latent_scale: initial scale of the words that a latent points at.
        reach: as of `Associative`, for the latents too.
        associative: the other options of `Associative`.
    """

    name = "hybrid"

    def __init__(
        self,
        shape: Shape,
        *,
        latents: int = 16,
        width: int = 320,
        heads: int = 5,
        latent_scale: float = 0.035,
        reach: float = 4.0,
        **associative: Any,
    ):
        super().__init__(shape, width=width, heads=heads, reach=reach, **associative)
        self.check(shape, width, heads, latents=(latents, 1))
        sites = shape.sites
        self.query = nn.Parameter(0.5 * torch.randn(latents, width))
        self.site = nn.Parameter(0.1 * torch.randn(len(sites), 1, width))
        self.cross, self.block = CrossAttention(width, heads), Block(width, heads)
        self.read = nn.LayerNorm(width)
        self.find = nn.Linear(width, width, bias=False)
        self.key = nn.ModuleList(nn.Linear(width, site.d_in) for site in sites)
        self.value = nn.ModuleList(Value(width, shape.d_model, latent_scale, 0.2, reach) for _ in sites)
        self.log_latent_ridge = nn.Parameter(self.log_ridge.detach()[:, 1].clone())

    def slots(self, index: int, x: Tensor, z: Tensor, features: Features, stat: SiteStatistics) -> list[Slots]:
        latents = (self.query + self.site[index]).expand(len(z), -1, -1)
        latents = self.read(self.block(self.cross(latents, z, features.mask)))  # (documents, latents, width)
        scores = self.find(latents) @ z.mT / z.shape[-1] ** 0.5
        words = scores.masked_fill(~features.mask[:, None], -torch.inf).softmax(dim=-1) @ features.words
        values = self.value[index](latents, words) * (stat.residual_norm / stat.gain)
        own = Slots(typical(self.key[index](latents), stat.moment), values, self.log_latent_ridge[index].exp())
        return [*super().slots(index, x, z, features, stat), own]
