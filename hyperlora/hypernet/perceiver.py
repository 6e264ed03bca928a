"""A perceiver: learned queries read the document, and each becomes one rank of one site's patch.

The family of Doc-to-LoRA (Charakorn et al. 2026, arXiv 2602.15902). A perceiver (Jaegle et al. 2021, arXiv 2103.03206)
has a fixed number of latents that read any number of tokens by cross-attention, so the patch of a chunk has the same
rank whatever its length. Here each site has its own latents and sees the document through its own inputs as well. The
trunk is shared by all sites; a learned embedding tells it which one it works for. It starts with heads that undo the
projections which read (`Perceiver._echo`); which tokens to look at, and which words belong to which inputs, which
`Associative` is built to know, has to be learned.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.hypernet.blocks import Block, CrossAttention
from hyperlora.hypernet.contract import Features, Hypernet, Pair, Reading, Shape
from hyperlora.hypernet.units import in_units
from hyperlora.statistics import SiteStatistics
from hyperlora.structure import Site

_SHARPNESS = 8.0  # scores of a standard deviation above one, so that latents start with different tokens


class Perceiver(Hypernet):
    """Ranks from latents that read the document, and ranks that are the same for all documents.

    Of each unit latent the site's head makes n (d_in) and m (d_out), each of size about 1 at the start; a fixed rank
    has learned ones. A learned `output_scale` per rank brings them into the units of the site (units.py). A patch
    composed of several chunks or documents has the document-independent ranks once for each of them.

    Args:
        shape: each site writes into the residual stream (d_out = `d_model`).
        width, depth, heads: of the trunk; one of `depth` blocks is cross-attention to the document, self-attention
            among the latents of all sites, and an MLP.
        latents: ranks of a site that are read from the document.
        fixed_ranks: ranks of a site that are the same for all documents. The default sum is the default rank of a
            patch, so that nothing is capped.
        scale: initial `output_scale`.
    """

    name = "perceiver"
    strengths = ("output_scale",)

    def __init__(
        self,
        shape: Shape,
        *,
        width: int = 320,
        depth: int = 4,
        heads: int = 5,
        latents: int = 56,
        fixed_ranks: int = 8,
        scale: float = 0.002,
    ):
        super().__init__()
        self.check(shape, width, heads, depth=(depth, 1), latents=(latents, 1), fixed_ranks=(fixed_ranks, 0))
        if scale <= 0:
            raise self.refuse(f"scale ({scale}) must be positive")
        sites, d_model = shape.sites, shape.d_model
        self.mix = nn.Linear(4 * d_model, width)
        self.own = nn.ModuleList(nn.Linear(site.d_in, width, bias=False) for site in sites)
        self.norm = nn.LayerNorm(width)
        # The queries keep a site's latents apart, for what they have in common adds up over its ranks; they are not
        # larger, for the latents shall differ between documents too. A site has its own head: a small hint is enough.
        self.query = nn.Parameter(0.5 * torch.randn(latents, width))
        self.site = nn.Parameter(0.1 * torch.randn(len(sites), width))
        self.cross = nn.ModuleList(CrossAttention(width, heads) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.heads = nn.ModuleList(_Head(width, site, fixed_ranks) for site in sites)
        self._echo(d_model)
        self.output_scale = nn.Parameter(torch.full((len(sites), latents + fixed_ranks), scale))

    @torch.no_grad()
    def _echo(self, d_model: int) -> None:
        """Start where a latent's n is what the site's input was at the few tokens it happens to look at, and its m the
        words that followed them: what is read goes through untouched, and a head undoes the projections that read."""
        for cross in self.cross:
            assert isinstance(cross, CrossAttention)
            cross.pass_on(_SHARPNESS)
        following = nn.init.orthogonal_(torch.empty(self.mix.out_features, d_model))
        self.mix.weight[:, -d_model:] = following
        for head, own in zip(self.heads, self.own, strict=True):
            assert isinstance(head, _Head) and isinstance(own, nn.Linear)
            nn.init.orthogonal_(own.weight)
            head.start(own.weight, following)

    def forward(self, reading: Reading, statistics: Sequence[SiteStatistics]) -> list[Pair]:
        latents = self.read(reading.features, statistics)
        made = [head(latents[:, index]) for index, head in enumerate(self.heads)]
        scales = zip(made, self.output_scale, statistics, strict=True)
        return [in_units(n, m, scale, stat) for (n, m), scale, stat in scales]

    def read(self, features: Features, statistics: Sequence[SiteStatistics]) -> Tensor:
        """Unit latents (documents, sites, latents, width)."""
        count, documents = len(self.site), len(features.mask)
        hidden = F.rms_norm(features.hidden, features.hidden.shape[-1:])
        following = F.rms_norm(features.following, features.following.shape[-1:])
        shared = self.mix(torch.cat([rearrange(hidden, "b t k d -> b t (k d)"), following], dim=-1))
        inputs = [x / stat.moment.diagonal.sqrt() for x, stat in zip(features.inputs, statistics, strict=True)]
        own = [look(F.rms_norm(x, x.shape[-1:])) for look, x in zip(self.own, inputs, strict=True)]
        tokens = self.norm(shared[:, None] + torch.stack(own, dim=1))  # (documents, sites, tokens, width)
        tokens, mask = rearrange(tokens, "b s t w -> (b s) t w"), repeat(features.mask, "b t -> (b s) t", s=count)
        z = repeat(self.query + self.site[:, None], "s l w -> (b s) l w", b=documents)
        for cross, block in zip(self.cross, self.blocks, strict=True):
            # A site reads the tokens by itself, then all sites of a document share what they found.
            z = rearrange(cross(z, tokens, mask), "(b s) l w -> b (s l) w", s=count)
            z = rearrange(block(z), "b (s l) w -> (b s) l w", s=count)
        return F.normalize(rearrange(z, "(b s) l w -> b s l w", s=count), dim=-1)


class _Head(nn.Module):
    """n (documents, ranks, d_in) and m (documents, ranks, d_out) of one site: those read from latents, then the fixed
    ones."""

    def __init__(self, width: int, site: Site, fixed: int):
        super().__init__()
        self.widths = [site.d_in, site.d_out]
        # Entries of this size make |n| and |m| about 1, for a unit latent and for a fixed rank.
        size = torch.cat([torch.full((d,), d**-0.5) for d in self.widths])
        self.weight = nn.Parameter(torch.randn(width, len(size)) * size)
        self.fixed = nn.Parameter(torch.randn(fixed, len(size)) * size) if fixed else None

    def start(self, *read: Tensor) -> None:
        """Begin as the transpose of the projections (width, d_in) and (width, d_out), at the size of random weights."""
        for own, projection in zip(self.weight.split(self.widths, dim=1), read, strict=True):
            own.copy_(projection / projection.std() * projection.shape[1] ** -0.5)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        ranks = latents @ self.weight
        if self.fixed is not None:
            ranks = torch.cat([ranks, self.fixed.expand(len(ranks), -1, -1)], dim=1)
        n, m = ranks.split(self.widths, dim=-1)
        return n, m
