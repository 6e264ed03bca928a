"""The best low-rank approximation of a patch for typical inputs: QR of the values, spectrum in the metric of C."""

import torch
from torch import Tensor

from hyperlora.statistics import SecondMoment


def cap_rank(a: Tensor, b: Tensor, rank: int, moment: SecondMoment | None = None) -> tuple[Tensor, Tensor]:
    """Reduce B A to `rank`, minimising E |(B A - B' A') x|^2 over inputs with second moment C (plain Frobenius norm
    when `moment` is None).

    The optimum is B' A' = U U^T B A, with U the leading left singular vectors of B A C^(1/2). Gradients flow through
    B A and treat the subspace U as a constant: the derivative of an SVD explodes where singular values meet.

    Args:
        a: (..., rows, d_in).
        b: (..., d_out, rows).

    Returns:
        A' (..., r, d_in) and B' (..., d_out, r) with r = min(rank, rows), row i of A' and column i of B' of equal
        norm, strongest first when the rank was reduced.
    """
    if a.shape[-2] <= rank:
        return _balanced(a, b)
    with torch.no_grad():
        root = a.float() if moment is None else moment.factor(a.float())  # (..., rows, d_in + directions)
        if b.shape[-1] < b.shape[-2]:
            q, r = torch.linalg.qr(b.float())  # (..., d_out, rows), (..., rows, rows)
            u = q @ _leading(r @ root, rank)
        else:
            u = _leading(b.float() @ root, rank)  # (..., d_out, rank)
        peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))
        u = u * peak.sign()  # eigenvectors have no sign of their own; fix it, so that equal input gives equal output
    reduced = (u.mT @ b.float()) @ a.float()  # (..., rank, d_in)
    return _balanced(reduced, u)


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with row i of `a` and column i of `b` of equal norm, which suits 16-bit storage."""
    size_a = a.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)  # (..., rows, 1)
    size_b = b.detach().norm(dim=-2, keepdim=True).mT.clamp_min(1e-12)
    scale = (size_b / size_a).sqrt()
    return a * scale, b / scale.mT


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Leading `rank` left singular vectors of (..., n, m), strongest first."""
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)[..., :rank]
