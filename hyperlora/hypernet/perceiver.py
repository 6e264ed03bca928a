"""A perceiver: learned queries read the document, and each becomes one rank of one site's patch.

The family of Doc-to-LoRA (Charakorn et al. 2026, arXiv 2602.15902). A perceiver (Jaegle et al. 2021, arXiv 2103.03206)
has a fixed number of latents that read any number of tokens by cross-attention, so the patch of a chunk has the same
rank whatever its length. Here each site has its own latents and sees the document through its own inputs as well. The
trunk is shared by all sites; a learned embedding tells it which one it works for. Untrained it stores nothing of use:
what to write for a token, which `Associative` is built to know, has to be learned.
"""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import InputError
from hyperlora.hypernet.blocks import Block, CrossAttention
from hyperlora.hypernet.contract import Factors, Features, Hypernet
from hyperlora.statistics import SiteStatistics
from hyperlora.structure import Site


class Perceiver(Hypernet):
    """Ranks from latents that read the document, and ranks that are the same for all documents.

    Of each unit latent the site's head makes n (d_in) and m (d_out); a fixed rank has learned ones. The rank is

    - A: C^-1 D^(1/2) n, with D the diagonal part of the second moment C. Whitening takes the common directions out of
      a key, as in `Associative`. As C >= D, an input has E[(a x)^2] = n^T D^(1/2) C^-1 D^(1/2) n <= |n|^2, and |n| is
      about 1 at the start: a typical input gives an activation of at most order 1 whatever the units of the site.
    - B: s (|h| / gain) m, with |h| the residual's size, |m| about 1 and a learned `output_scale` s per rank: at the
      start, an activation of 1 moves the residual by the fraction s of its size. s is not zero, for with A or B zero
      the other factor has no gradient; it is one parameter for all sites, so that it can have its own learning rate.

    A patch composed of several chunks or documents has the document-independent ranks once for each of them.

    Args:
        sites: the modules to write to; each writes into the residual stream (d_out = `d_model`), since calibration
            measures the units of B only there.
        width, depth, heads: of the trunk; one of `depth` blocks is cross-attention to the document, self-attention
            among the latents of all sites, and an MLP.
        latents: ranks of a site that are read from the document.
        fixed_ranks: ranks of a site that are the same for all documents. The default sum is the default rank of a
            patch, so that nothing is capped.
        scale: initial `output_scale`.
    """

    strengths = ("output_scale",)

    def __init__(
        self,
        sites: list[Site],
        d_model: int,
        *,
        width: int = 320,
        depth: int = 4,
        heads: int = 5,
        latents: int = 56,
        fixed_ranks: int = 8,
        scale: float = 0.01,
    ):
        super().__init__()
        wrong = [site.path for site in sites if site.d_out != d_model]
        if wrong:
            raise InputError(f"the perceiver generator writes to the residual stream; {wrong[0]} does not")
        if width % heads:
            raise InputError(f"options of the hypernet perceiver: heads ({heads}) must divide width ({width})")
        for name, value, least in (("depth", depth, 1), ("latents", latents, 1), ("fixed_ranks", fixed_ranks, 0)):
            if value < least:
                raise InputError(f"options of the hypernet perceiver: {name} ({value}) must be at least {least}")
        if scale <= 0:
            raise InputError(f"options of the hypernet perceiver: scale ({scale}) must be positive")
        self.mix = nn.Linear(3 * d_model, width)
        self.own = nn.ModuleList(nn.Linear(site.d_in, width, bias=False) for site in sites)
        self.norm = nn.LayerNorm(width)
        # The queries keep a site's latents apart, for what they have in common adds up over its ranks; they are not
        # larger, for the latents shall differ between documents too. A site has its own head: a small hint is enough.
        self.query = nn.Parameter(0.5 * torch.randn(latents, width))
        self.site = nn.Parameter(0.1 * torch.randn(len(sites), width))
        self.cross = nn.ModuleList(CrossAttention(width, heads) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.heads = nn.ModuleList(_Head(width, site, fixed_ranks) for site in sites)
        self.output_scale = nn.Parameter(torch.full((len(sites), latents + fixed_ranks), scale))

    def forward(self, features: Features, statistics: Sequence[SiteStatistics]) -> list[Factors]:
        latents = self.read(features)
        factors = []
        for index, (head, stat) in enumerate(zip(self.heads, statistics, strict=True)):
            n, m = head(latents[:, index])
            a = stat.moment.solve(n * stat.moment.diagonal.sqrt())  # (documents, ranks, d_in)
            b = self.output_scale[index, :, None] * (stat.residual_norm / stat.gain) * m
            factors.append((a, rearrange(b, "documents ranks d_out -> documents d_out ranks")))
        return factors

    def read(self, features: Features) -> Tensor:
        """Unit latents (documents, sites, latents, width)."""
        count, documents = len(self.site), len(features.mask)
        hidden = F.rms_norm(features.hidden, features.hidden.shape[-1:])
        shared = self.mix(rearrange(hidden, "b t k d -> b t (k d)"))
        own = [look(F.rms_norm(x, x.shape[-1:])) for look, x in zip(self.own, features.inputs, strict=True)]
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

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        ranks = latents @ self.weight
        if self.fixed is not None:
            ranks = torch.cat([ranks, self.fixed.expand(len(ranks), -1, -1)], dim=1)
        n, m = ranks.split(self.widths, dim=-1)
        return n, m
