"""Ranks of any origin in the units of a site, so that a hypernetwork writes numbers of order 1 everywhere."""

from einops import rearrange
from torch import Tensor

from hyperlora.hypernet.contract import Pair
from hyperlora.statistics import SiteStatistics


def in_units(n: Tensor, m: Tensor, scale: Tensor, statistics: SiteStatistics) -> Pair:
    """The ranks n (documents, ranks, d_in) and m (documents, ranks, d_out), each of size about 1, as A and B.

    - A: C^-1 D^(1/2) n, with D the diagonal part of the second moment C. Whitening takes the common directions out of
      a key, as in `Associative`. As C >= D, an input has E[(a x)^2] = n^T D^(1/2) C^-1 D^(1/2) n <= |n|^2: a typical
      input gives an activation of at most order 1 whatever the units of the site.
    - B: s (|h| / gain) m, with |h| the residual's size and a learned `scale` s (ranks,): an activation of 1 moves the
      residual by the fraction s of its size. s must not start at zero, for with A or B zero the other factor has no
      gradient.
    """
    a = statistics.moment.solve(n * statistics.moment.diagonal.sqrt())
    b = scale[:, None] * (statistics.residual_norm / statistics.gain) * m
    return a, rearrange(b, "documents ranks d_out -> documents d_out ranks")
