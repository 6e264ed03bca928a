"""A LoRA (Hu et al. 2021, arXiv 2106.09685) of the base that a hypernetwork trains along, the same for all documents.

All modules' A, and all modules' B, are one parameter each, which the hypernetwork itself owns: ZeRO 3 takes weights
away when the module that owns them is done, and these are needed until the base has read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperlora.hypernet.contract import Pair
from hyperlora.structure import Site


def adapter_parameters(sites: Sequence[Site], rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A of all sites, random, and B, zero, so that the adapter has no effect at first; both flat."""
    down = torch.cat([torch.randn(rank * site.d_in) / site.d_in**0.5 for site in sites])
    return nn.Parameter(down), nn.Parameter(torch.zeros(rank * sum(site.d_out for site in sites)))


def adapter_factors(sites: Sequence[Site], rank: int, down: Tensor, up: Tensor, alpha: float = 1.0) -> dict[str, Pair]:
    """What is in the parameters: A (1, rank, d_in) and `alpha` times B (1, d_out, rank) by module."""
    downs = down.split([rank * site.d_in for site in sites])
    ups = up.split([rank * site.d_out for site in sites])
    return {
        site.path: (a.view(1, rank, site.d_in), alpha * b.view(1, site.d_out, rank))
        for site, a, b in zip(sites, downs, ups, strict=True)
    }
