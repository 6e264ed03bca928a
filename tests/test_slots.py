from collections.abc import Sequence

import torch

from hyperlora.hypernet.slots import Equations, Slots, added, solved
from hyperlora.rank_cap import cap_rank

from .test_statistics import fitted


def slots(count: int, seed: int) -> Slots:
    """Of two documents."""
    torch.manual_seed(seed)
    return Slots(torch.randn(2, count, 24), torch.randn(2, count, 16), torch.tensor(0.3))


def joined(*parts: Slots) -> Slots:
    return Slots(torch.cat([p.x for p in parts], 1), torch.cat([p.values for p in parts], 1), parts[0].ridge)


def capped(groups: Sequence[Slots | Equations], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b, outputs = solved(groups, fitted())
    return cap_rank(a, b, rank, outputs)


def slow(some: Slots) -> torch.Tensor:
    """(documents, d_out, d_in), the minimum of |V - X W|^2 + ridge d_in tr(W^T C W) in double precision."""
    x, values = some.x.double(), some.values.double()
    system = x.mT @ x + some.ridge.double() * 24 * fitted().dense().double()
    return torch.linalg.solve(system, x.mT @ values).mT


def test_the_update_of_slots_is_the_ridge_solution() -> None:
    for some in (slots(10, 0), slots(60, 1)):  # fewer and more than inputs
        for a, b, _ in (some.update(fitted()), some.equations.update(fitted())):
            torch.testing.assert_close((b @ a).double(), slow(some), rtol=1e-3, atol=1e-4)


def test_a_slot_that_is_larger_counts_for_more() -> None:
    """Inputs and values times the root of two are as good as the same slot twice."""
    some = slots(30, 2)
    weight = torch.where(torch.arange(30) % 3 == 0, 2.0, 1.0).sqrt()[:, None]
    twice = Slots(some.x[:, ::3], some.values[:, ::3], some.ridge)
    a, b, _ = Slots(some.x * weight, some.values * weight, some.ridge).update(fitted())
    torch.testing.assert_close((b @ a).double(), slow(joined(some, twice)), rtol=1e-3, atol=1e-4)


def test_chunks_that_join_are_as_if_all_slots_had_been_there_at_once() -> None:
    """In their solution, at a small rank, and in the gradient of all of them; two groups stay apart."""
    towards = torch.randn(2, 16, 24)
    parts = [slots(count, seed) for seed, count in enumerate((7, 20, 12))]
    others = [slots(count, seed) for seed, count in enumerate((3, 5, 9), 5)]
    for rank in (16, 5):
        found = []
        for chunked in (True, False):
            leaves = [t.clone().requires_grad_() for p in (*parts, *others) for t in (p.x, p.values)]
            every = [Slots(x, v, torch.tensor(0.3)) for x, v in zip(leaves[::2], leaves[1::2], strict=True)]
            if chunked:
                groups = added(added((every[0], every[3]), (every[1], every[4])), (every[2], every[5]))
            else:
                groups = (joined(*every[:3]), joined(*every[3:]))
            a, b = capped(groups, rank)
            assert a.shape[1] == rank
            ((b @ a) - towards).square().sum().backward()
            found.append([b @ a, *(leaf.grad for leaf in leaves)])
        if rank == 16:
            whole = slow(joined(*parts)) + slow(joined(*others))
            torch.testing.assert_close(found[0][0].double(), whole, rtol=1e-3, atol=1e-3)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


def test_a_small_rank_keeps_what_is_written_where_it_counts() -> None:
    """The best of its rank at the slots' own inputs, each as heavy as its value: against the dense SVD. A slot that
    writes a thousand times as much as the others is kept to the last."""
    some = slots(20, 3)
    a, b = capped([some], 5)
    update = slow(some)
    seen = (some.x * some.values.norm(dim=-1, keepdim=True)).double().mT  # (documents, d_in, slots)
    u, s, vh = torch.linalg.svd(update @ seen, full_matrices=False)
    best = (u[..., :5] * s[..., None, :5]) @ vh[..., :5, :]
    torch.testing.assert_close((b @ a).double() @ seen, best, rtol=1e-3, atol=1e-3 * float(s.max()))
    strong = some.values.clone()
    strong[:, 4] *= 1000
    a, b = capped([Slots(some.x, strong, some.ridge)], 1)
    written = (some.x[:, 4, None] @ (b @ a).mT)[:, 0]
    wanted = (slow(Slots(some.x, strong, some.ridge)).float() @ some.x[:, 4, :, None])[..., 0]
    assert bool((torch.cosine_similarity(written, wanted, dim=-1) > 0.999).all())


def test_padding_changes_nothing() -> None:
    some = slots(9, 4)
    padded = joined(some, Slots(torch.zeros(2, 4, 24), torch.zeros(2, 4, 16), some.ridge))
    for rank in (4, 30):
        (a, b), (more_a, more_b) = (capped([one], rank) for one in (some, padded))
        torch.testing.assert_close(b @ a, more_b @ more_a, rtol=1e-4, atol=1e-4)
