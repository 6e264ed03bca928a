import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.hypernet import HYPERNETS
from hyperlora.hypernet.associative import compete, strongest

from .conftest import OPTIONS, make_base, make_generator
from .test_statistics import fitted


@pytest.mark.parametrize("name", sorted(HYPERNETS))
def test_contract(any_base: BaseModel, documents: list[str], name: str) -> None:
    """Shapes, zero padded rows, and a gradient to every parameter."""
    generator = make_generator(any_base, hypernet=name)
    ids = [generator.encoder.tokenize(text) for text in documents[:2]]
    features = generator.encoder.read(ids)
    factors = generator.hypernet(features, generator.statistics)
    loss = torch.zeros(())
    for site, (a, b) in zip(generator.sites, factors, strict=True):
        assert a.shape == (2, b.shape[2], site.d_in) and b.shape[:2] == (2, site.d_out)
        loss = loss + torch.tanh(b @ a).square().sum()
        alone = generator.hypernet(generator.encoder.read(ids[1:]), generator.statistics)[generator.sites.index(site)]
        torch.testing.assert_close((b @ a)[1], (alone[1] @ alone[0])[0], rtol=1e-4, atol=1e-5)
    loss.backward()
    silent = [n for n, p in generator.hypernet.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_competing_slots_are_the_ridge_solution() -> None:
    """B A minimises |V - X W|^2 + ridge d_in tr(W^T C W)."""
    moment = fitted()
    torch.manual_seed(0)
    x, values, ridge = torch.randn(1, 10, 24), torch.randn(10, 16), torch.tensor(0.3)
    toward = moment.solve(x)
    update = toward[0].T @ compete(x, toward, values[None], ridge)[0]  # (d_in, d_out)
    c = moment.dense()
    slow = torch.linalg.solve(x[0].T @ x[0] + ridge * 24 * c, x[0].T @ values)
    torch.testing.assert_close(update, slow, rtol=1e-3, atol=1e-4)


def test_the_strongest_tokens_point_whatever_the_padding() -> None:
    strength = torch.tensor([[0.2, 0.9, 0.5, 0.5, 0.7], [0.3, 0.1, 9.0, 9.0, 9.0]])[..., None]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert strongest(strength, mask, 3).squeeze(-1).tolist() == [[1, 2, 4], [0, 1, 2]]
    assert strongest(strength, mask, 9).shape == (2, 5, 1)


def test_long_documents_have_few_pointers_and_short_ones_lose_none(documents: list[str]) -> None:
    base, few = make_base(), 12
    free = make_generator(base, options={**OPTIONS, "pointers": 500})
    capped = make_generator(base, options={**OPTIONS, "pointers": few})
    for text, same in ((documents[0][:25], True), (documents[0], False)):
        ids = free.encoder.tokenize(text)
        assert (len(ids) <= few) is same
        features = free.encoder.read([ids])
        (a, b), (capped_a, capped_b) = (g.hypernet(features, g.statistics)[0] for g in (free, capped))
        assert capped_a.shape[1] == len(ids) + min(few, len(ids))
        assert torch.allclose(b @ a, capped_b @ capped_a, atol=1e-5) is same
    with_others = capped.factors([capped.encoder.tokenize(text) for text in documents])
    alone = capped.factors([capped.encoder.tokenize(documents[1])])
    for path, (a, b) in alone.items():
        torch.testing.assert_close((with_others[path][1] @ with_others[path][0])[1], (b @ a)[0], rtol=1e-4, atol=1e-5)
