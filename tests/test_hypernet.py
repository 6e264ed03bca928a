import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.hypernet import HYPERNETS
from hyperlora.hypernet.associative import compete

from .conftest import make_generator
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
