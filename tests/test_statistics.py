import torch

from hyperlora.statistics import SecondMoment

from .conftest import TEXT, make_base, make_generator


def fitted(d_in: int = 24, directions: int = 5) -> SecondMoment:
    torch.manual_seed(0)
    x = torch.randn(200, d_in) @ torch.randn(d_in, d_in)
    moment = SecondMoment(d_in, directions)
    moment.fit(x.T @ x / len(x), ridge=0.05)
    return moment


def test_woodbury_solve_is_the_exact_inverse() -> None:
    moment, x = fitted(), torch.randn(3, 7, 24)
    exact = torch.linalg.solve(moment.dense().double(), x.double().mT).mT
    torch.testing.assert_close(moment.solve(x).double(), exact, rtol=1e-4, atol=1e-5)


def test_all_directions_give_back_the_moment_and_none_its_diagonal() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 8)
    full = x.T @ x / 100
    for directions, expected in ((8, full), (12, full), (0, torch.diag(full.diagonal()))):
        moment = SecondMoment(8, directions)
        moment.fit(full, ridge=1e-6)
        torch.testing.assert_close(moment.dense(), expected, atol=1e-4, rtol=1e-4)


def test_factor_squares_to_the_metric() -> None:
    moment, a = fitted(), torch.randn(4, 24)
    torch.testing.assert_close(moment.factor(a) @ moment.factor(a).T, a @ moment.dense() @ a.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moment.spread(), moment.dense().diagonal().sqrt())


def test_calibration_measures_the_inputs_of_the_module() -> None:
    base = make_base()
    generator = make_generator(base, moment_directions=32, ridge=1e-9)
    texts = [generator.encoder.sink + generator.encoder.tokenize(t)[:512] for t in (TEXT, TEXT[::-1])]
    seen: list[torch.Tensor] = []
    module = base.model.get_submodule(generator.sites[1].path)
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0][0, 1:]))
    for ids in texts:
        base.model(torch.tensor([ids]))
    handle.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(generator.statistics[1].moment.dense(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_the_size_of_the_stream_ignores_a_few_huge_channels() -> None:
    """Huge channels multiply the norm of the stream; a patch as large as that would drown the others."""

    def sizes(huge: float) -> torch.Tensor:
        base = make_base()
        base.model.model.embed_tokens.weight.data[:, :2] *= huge
        generator = make_generator(base)
        return torch.stack([stat.residual_norm for stat in generator.statistics])

    plain = sizes(1.0)
    assert (plain > 0).all()
    assert (sizes(1000.0) < 4 * plain).all()


def test_the_size_of_a_gaussian_stream_is_its_norm() -> None:
    base = make_base()
    torch.nn.init.normal_(base.model.model.embed_tokens.weight, std=1000.0)  # the layers add nothing beside that
    size = float(make_generator(base).statistics[0].residual_norm)
    assert abs(size / (1000.0 * 32**0.5) - 1) < 0.15
