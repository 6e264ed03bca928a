"""How strongly an update moves a module's output, and how a sum of updates is held to the strength of one of them.

Updates of many chunks or documents add up: what each does to text that it has nothing to do with grows with their
number, until the model garbles. Scaling the sum down to the norm of its strongest part bounds that, at the price of
weaker memories (docs/results.md measures both).
"""

from torch import Tensor

from hyperlora.statistics import SecondMoment


def update_norm(a: Tensor, b: Tensor, moment: SecondMoment | None = None) -> Tensor:
    """Root mean square over inputs x with second moment C of |B A x|; the Frobenius norm when `moment` is None.

    a (..., rows, d_in), b (..., d_out, rows). Returns (...,).
    """
    root = a.float() if moment is None else moment.factor(a.float())
    gram = (b.float().mT @ b.float()) * (root @ root.mT)
    return gram.sum((-1, -2)).clamp_min(1e-24).sqrt()


def hold(a: Tensor, b: Tensor, bound: Tensor, moment: SecondMoment | None = None) -> tuple[Tensor, Tensor]:
    """The same update, scaled down where its `update_norm` exceeds `bound` (...,); both factors alike, for 16 bit."""
    scale = (bound / update_norm(a, b, moment)).clamp_max(1.0).sqrt()[..., None, None]
    return a * scale.to(a.dtype), b * scale.to(b.dtype)
