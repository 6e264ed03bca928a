"""The best low-rank approximation of a patch for the inputs that matter: its singular vectors in their metric."""

from collections.abc import Sequence

import torch
from torch import Tensor

_FEW = 100  # outputs below which a decomposition costs nothing
_MANY = 4  # outputs to a rank from which the subspace is found by so many steps of iteration
_STEPS = 5
# Squares of singular values, of the largest one: below, there is nothing but rounding to keep. Such directions stay
# zero, for a gradient through them would depend on the rounding.
_NOTHING = 1e-12


def cap_rank(a: Tensor, b: Tensor, rank: int, outputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Reduce B A to `rank`, minimising |(B A - B' A') X|^2 for inputs X that matter (plain Frobenius norm when
    `outputs` is None).

    The optimum is B' A' = U U^T B A, with U the leading left singular vectors of `outputs`. Where they are few of
    the outputs, U is found by iteration, and where singular values fall off, what is kept is the most that can be but
    for a few thousandths. How many rows there are does not matter, so that a patch does not depend on the padding of
    its batch. Gradients flow through B A and treat the subspace U as a constant: the derivative of an SVD explodes
    where singular values meet.
    Where no more than `rank` rows of A are not zero, they are kept as they are: nothing is lost, and the gradient does
    not depend on how many rows of padding a batch adds.

    Args:
        a: (..., rows, d_in).
        b: (..., d_out, rows).
        outputs: B A X (..., d_out, any); for inputs of second moment M any root of B A M A^T B^T.

    Returns:
        A' (..., r, d_in) and B' (..., d_out, r) with r = min(rank, rows), row i of A' and column i of B' of equal
        norm; the strongest first, nearly so after iteration, when the rank was reduced.
    """
    return cap_ranks([(a, b, b.double() @ a.double() if outputs is None else outputs)], rank)[0]


def cap_ranks(sites: Sequence[tuple[Tensor, Tensor, Tensor]], rank: int) -> list[tuple[Tensor, Tensor]]:
    """`cap_rank` of A, B and outputs of several sites; those of equal shapes together, for their matrices are small and
    many."""
    alike: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for index, (a, _, outputs) in enumerate(sites):
        if a.shape[-2] > rank:
            alike.setdefault((a.shape, outputs.shape), []).append(index)
    capped = [_balanced(a, b) if a.shape[-2] <= rank else (a, b) for a, b, _ in sites]
    for indices in alike.values():
        with torch.no_grad():
            subspaces = _leading(torch.stack([sites[index][2] for index in indices]).double(), rank)
        for index, u in zip(indices, subspaces, strict=True):
            capped[index] = _within(u, *capped[index])
    return capped


def _within(u: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """U U^T B A as factors, for U (..., d_out, rank)."""
    filled = a.detach().abs().amax(-1) > 0  # (..., rows)
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    u = u * peak.sign()  # eigenvectors have no sign of their own; fix it, so that equal input gives equal output
    rank = u.shape[-1]  # less than was asked for where d_out is
    first = filled.int().argsort(dim=-1, descending=True, stable=True)[..., :rank]
    few = (filled.sum(-1) <= rank)[..., None, None]
    reduced = (u.mT @ b.float()) @ a.float()  # (..., rank, d_in)
    kept_a = a.float().take_along_dim(first[..., :, None], dim=-2)
    kept_b = b.float().take_along_dim(first[..., None, :], dim=-1)
    return _balanced(torch.where(few, kept_a, reduced), torch.where(few, kept_b, u))


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with row i of `a` and column i of `b` of equal norm, which suits 16-bit storage."""
    size_a = a.detach().norm(dim=-1, keepdim=True).clamp_min(1e-12)  # (..., rows, 1)
    size_b = b.detach().norm(dim=-2, keepdim=True).mT.clamp_min(1e-12)
    scale = (size_b / size_a).sqrt()
    return a * scale, b / scale.mT


def _leading(outputs: Tensor, rank: int) -> Tensor:
    """Leading `rank` left singular vectors (..., d_out, rank) in float32, strongest first where they are exact. All in
    double precision: squaring halves the digits, and rounding must not move close directions."""
    d_out, inputs = outputs.shape[-2:]
    if d_out >= max(_MANY * rank, _FEW):
        return _iterated(outputs, rank).float()
    if inputs >= d_out:
        values, left = torch.linalg.eigh(outputs @ outputs.mT)
        values, left = values.flip(-1)[..., None, :rank], left.flip(-1)[..., :rank]
        return torch.where(values > _NOTHING * values[..., :1], left, 0.0).float()
    values, right = torch.linalg.eigh(outputs.mT @ outputs)
    values, right = values.flip(-1)[..., None, :rank], right.flip(-1)[..., :rank]
    kept = values > _NOTHING * values[..., :1]
    return torch.where(kept, outputs @ right * values.clamp_min(1e-300).rsqrt(), 0.0).float()


def _iterated(product: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of a matrix, nearly: by subspace iteration (Halko et al. 2011, arXiv
    0909.4061), in double precision, in which weak directions are found beside ones a thousand times as strong. It takes
    nothing but matrix products and triangles, which a GPU does for a whole batch at once; QR and eigendecompositions it
    does one by one."""
    start = torch.randn(product.shape[-2], rank, generator=torch.Generator().manual_seed(0))
    found = start.to(product).expand(*product.shape[:-2], -1, -1)
    for _ in range(_STEPS):
        found = _orthonormal(product @ (product.mT @ found))
    found = _orthonormal(found)
    kept = (product.mT @ found).square().sum(-2, keepdim=True)
    return torch.where(kept > _NOTHING * kept.amax(-1, keepdim=True), found, 0.0)


def _orthonormal(columns: Tensor) -> Tensor:
    """Gram and Schmidt's, by the Cholesky factor of the products of the columns made equally long. Applied twice, it is
    as good as Householder's (Yamamoto et al. 2015, doi 10.1553/etna_vol44s306)."""
    gram = columns.mT @ columns
    size = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-24).rsqrt()[..., None, :]  # one over each column's length
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(size.mT * gram * size + 1e-12 * one)
    return columns @ (torch.linalg.solve_triangular(factor, one, upper=False) * size).mT
