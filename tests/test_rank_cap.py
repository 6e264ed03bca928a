import pytest
import torch

from hyperlora.rank_cap import cap_rank, cap_ranks

from .test_statistics import fitted


def test_cap_is_the_best_approximation_for_typical_inputs() -> None:
    moment = fitted()
    torch.manual_seed(1)
    for rows in (12, 40):  # fewer and more rows than d_out
        a, b = torch.randn(rows, 24), torch.randn(16, rows)
        small_a, small_b = cap_rank(a, b, 5, b @ moment.factor(a))
        root = torch.linalg.cholesky(moment.dense().double())
        u, s, vh = torch.linalg.svd((b @ a).double() @ root, full_matrices=False)
        best = (u[:, :5] * s[:5]) @ vh[:5]
        torch.testing.assert_close((small_b @ small_a).double() @ root, best, rtol=1e-3, atol=1e-3 * float(s[0]))


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("rows", [60, 150])  # fewer and more than outputs
def test_a_small_rank_of_many_outputs_keeps_nearly_the_most(decay: float, rows: int) -> None:
    torch.manual_seed(2)
    a, b = torch.randn(2, rows, 200), torch.randn(2, 128, rows) * torch.arange(1, 129)[:, None] ** -decay
    small_a, small_b = cap_rank(a, b, 8)
    exact = torch.linalg.svdvals((b @ a).double()).square()
    kept = (small_b @ small_a).double().square().sum((-1, -2)) / exact[:, :8].sum(-1)
    left = ((b @ a).double() - (small_b @ small_a).double()).square().sum((-1, -2)) / exact.sum(-1)
    assert bool((kept <= 1 + 1e-5).all()) and bool((kept > (0.999 if decay else 0.9)).all())
    torch.testing.assert_close(left, 1 - kept * exact[:, :8].sum(-1) / exact.sum(-1), rtol=1e-3, atol=1e-5)
    assert torch.equal(small_a, cap_rank(a, b, 8)[0])


def test_a_small_rank_keeps_nearly_the_most_for_typical_inputs_too() -> None:
    moment = fitted()
    torch.manual_seed(3)
    a, b = torch.randn(40, 24), torch.randn(16, 40) * torch.arange(1, 17)[:, None] ** -1.0
    small_a, small_b = cap_rank(a, b, 3, b @ moment.factor(a))
    root = torch.linalg.cholesky(moment.dense().double())
    exact = torch.linalg.svdvals((b @ a).double() @ root).square()
    kept = ((small_b @ small_a).double() @ root).square().sum()
    assert 0.999 * exact[:3].sum() < kept <= (1 + 1e-5) * exact[:3].sum()


def test_cap_without_a_metric_is_the_truncated_svd() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 9, 24), torch.randn(2, 16, 9)
    small_a, small_b = cap_rank(a, b, 5)
    u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
    torch.testing.assert_close(small_b @ small_a, (u[..., :5] * s[:, None, :5]) @ vh[:, :5], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small_a.norm(dim=-1), small_b.norm(dim=-2))


def test_small_ranks_keep_their_product_and_zero_padding_changes_nothing() -> None:
    moment = fitted()
    a, b = torch.randn(1, 6, 24), torch.randn(1, 16, 6)
    same_a, same_b = cap_rank(a, b, 6, b @ moment.factor(a))
    torch.testing.assert_close(same_b @ same_a, b @ a)
    torch.testing.assert_close(same_a.norm(dim=-1), same_b.norm(dim=-2))
    pad_a, pad_b = torch.cat([a, torch.zeros(1, 3, 24)], 1), torch.cat([b, torch.zeros(1, 16, 3)], 2)
    small, padded = cap_rank(a, b, 4, b @ moment.factor(a)), cap_rank(pad_a, pad_b, 4, pad_b @ moment.factor(pad_a))
    torch.testing.assert_close(small[1] @ small[0], padded[1] @ padded[0], rtol=1e-4, atol=1e-5)


def test_a_rank_beyond_the_outputs_keeps_everything() -> None:
    torch.manual_seed(0)
    for filled in (3, 9):
        a, b = torch.zeros(12, 24), torch.zeros(5, 12)
        a[:filled], b[:, :filled] = torch.randn(filled, 24), torch.randn(5, filled)
        small_a, small_b = cap_rank(a, b, 8, b @ fitted().factor(a))
        assert small_a.shape == (5, 24) and small_b.shape == (5, 5)
        torch.testing.assert_close(small_b @ small_a, b @ a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d_out", "d_in"), [(128, 200), (64, 200), (64, 50)])  # by iteration and by decomposition
def test_where_there_is_less_than_the_rank_the_gradient_does_not_depend_on_rounding(d_out: int, d_in: int) -> None:
    """Twenty directions in forty rows, of which thirty may stay: the other ten are nothing and stay zero."""
    torch.manual_seed(0)
    a, mixing, few = torch.randn(1, 40, d_in), torch.randn(20, 40), torch.randn(1, d_out, 20)
    weight = torch.randn(1, d_out, d_in)

    def gradient(noise: float) -> torch.Tensor:
        b = (few @ (mixing + noise * torch.randn(20, 40))).requires_grad_()
        small_a, small_b = cap_rank(a, b, 30)
        torch.testing.assert_close(small_b @ small_a, b @ a, rtol=1e-3, atol=1e-3)
        assert int((small_a.abs().amax(-1) > 0).sum()) == 20
        ((small_b @ small_a) * weight).sum().backward()
        assert b.grad is not None
        return b.grad

    exact = gradient(0.0)
    for _ in range(3):
        assert (gradient(1e-7) - exact).norm() < 1e-4 * exact.norm()


def test_sites_capped_together_are_as_each_alone() -> None:
    """Of three shapes, one of which has few enough rows already."""
    torch.manual_seed(0)
    shapes = [(40, 24, 128), (40, 24, 128), (40, 24, 16), (3, 24, 128)]
    sites = [(torch.randn(2, rows, d_in), torch.randn(2, d_out, rows)) for rows, d_in, d_out in shapes]
    together = cap_ranks([(a, b, b @ a) for a, b in sites], 5)
    for (a, b), found in zip(sites, together, strict=True):
        for one, other in zip(found, cap_rank(a, b, 5, b @ a), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_gradient_does_not_depend_on_padding() -> None:
    """The rows of a short document in a batch with a long one, not all of them at the front: as if it were alone."""
    torch.manual_seed(0)
    a, b, towards = torch.randn(3, 24), torch.randn(16, 3), torch.randn(16, 24)
    found = []
    for places in (range(3), (1, 4, 5)):
        rows, columns = torch.zeros(2, 7, 24), torch.zeros(2, 16, 7)
        rows[0, list(places)], columns[0][:, list(places)] = a, b
        rows[1], columns[1] = torch.randn(7, 24), torch.randn(16, 7)
        alone = found == []
        rows, columns = (rows[:1, :3], columns[:1, :, :3]) if alone else (rows, columns)
        rows, columns = rows.requires_grad_(), columns.requires_grad_()
        small_a, small_b = cap_rank(rows, columns, 4, columns @ fitted().factor(rows))
        ((small_b @ small_a)[0] - towards).square().sum().backward()
        assert rows.grad is not None and columns.grad is not None
        found.append((rows.grad[0, list(places)], columns.grad[0][:, list(places)]))
    torch.testing.assert_close(found[0], found[1])


def test_gradient_reaches_both_factors_and_is_finite_at_equal_singular_values() -> None:
    a = torch.eye(6).requires_grad_()
    b = torch.eye(6).requires_grad_()
    small_a, small_b = cap_rank(a, b, 3)
    (small_b @ small_a).square().sum().backward()
    for factor in (a, b):
        assert factor.grad is not None and torch.isfinite(factor.grad).all() and factor.grad.norm() > 0


def test_weak_directions_are_found_beside_strong_ones() -> None:
    """Of strengths from 1 to a thousandth, a small rank of many outputs keeps the right ones."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 10))[0] for n in (128, 40))
    strength = torch.logspace(0, -3, 10)
    a, b = right.mT, left * strength
    small_a, small_b = cap_rank(a, b, 8)
    torch.testing.assert_close(small_b @ small_a, (left[:, :8] * strength[:8]) @ right.mT[:8], rtol=0, atol=1e-4)
