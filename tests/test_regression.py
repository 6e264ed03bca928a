"""The closed-form start of distillation."""

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.inject import Factors
from hyperlora.methods.regression import fit, regress
from hyperlora.methods.self_study import Conversation
from hyperlora.methods.teaching import Lesson, differences, read, teach
from hyperlora.objectives import states
from hyperlora.prompt import document_ids, encode
from hyperlora.structure import Site, attention_outputs, find_sites

from .conftest import TEXT


def test_regression_equals_least_squares_with_a_penalty() -> None:
    """Against rows of zeros that pull towards zero, in float64; then against the singular vectors of that fit."""
    torch.manual_seed(0)
    x, y, ridge = torch.randn(50, 7), torch.randn(50, 5), 0.3
    c = ridge * x.square().sum() / 7
    rows = torch.cat([x, c.sqrt() * torch.eye(7)]).double()
    weight = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(7, 5)]).double()).solution
    a, b = regress(x, y, 5, ridge)
    torch.testing.assert_close((b @ a).T.double(), weight, rtol=1e-4, atol=1e-5)
    left, size, right = torch.linalg.svd(x.double() @ weight, full_matrices=False)
    a, b = regress(x, y, 2, ridge)
    assert a.shape == (2, 7) and b.shape == (5, 2)
    torch.testing.assert_close((x @ a.T @ b.T).double(), left[:, :2] * size[:2] @ right[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_a_ridge_that_drowns_in_single_precision_counts_all_the_same() -> None:
    """Far fewer tokens than channels, so that nothing but the ridge makes the equations definite."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 300), torch.randn(40, 5)
    assert int(torch.linalg.cholesky_ex(x.mT @ x + 1e-9 * 40 * torch.eye(300)).info) > 0
    a, b = regress(x, y, 5, 1e-9)
    torch.testing.assert_close(x @ (b @ a).mT, y, rtol=1e-2, atol=1e-2)


def test_a_rank_beyond_the_outputs_is_filled_up() -> None:
    a, b = regress(torch.randn(20, 7), torch.randn(20, 3), 5, 0.1)
    assert a.shape == (5, 7) and b.shape == (3, 5)
    assert float(a[3:].abs().max()) == 0.0 and float(b[:, 3:].abs().max()) == 0.0
    assert torch.linalg.matrix_rank(b @ a) == 3


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_the_fit_brings_the_student_to_the_teacher(any_base: BaseModel, layers: list[int] | None) -> None:
    """Behind every layer and its attention, as a patch that is injected, on lessons that were fitted and on others."""
    sites = find_sites(any_base.model, layers)
    numbers = [site.layer for site in sites]
    attention = attention_outputs(any_base.model, numbers)
    context, words = document_ids(any_base.tokenizer, TEXT[:200]), TEXT.split()
    held = [
        Conversation("question", context, " ".join(words[i : i + 3]), document_ids(any_base.tokenizer, words[-i - 1]))
        for i in range(60)
    ]
    lessons = teach(any_base, held, numbers, attention)
    unseen, seen = lessons[::5], [lesson for number, lesson in enumerate(lessons) if number % 5]
    factors = fit(any_base, seen, attention, sites, rank=16, ridge=0.1)
    assert set(factors) == {site.path for site in (*attention, *sites)}
    for site in (*attention, *sites):
        a, b = factors[site.path]
        assert a.shape == (1, 16, site.d_in) and b.shape == (1, site.d_out, 16)
    with torch.no_grad():
        for part, share in ((seen, 0.9), (unseen, 0.97)):
            far, near = (differences(any_base, part, numbers, f)[2] for f in (None, factors))
            assert float((near / far).max()) < share
            taught = torch.cat([lesson.attention for lesson in part], dim=1)
            far, near = (
                (attended(any_base, attention, part, f) - taught).square().sum((1, 2)) for f in (None, factors)
            )
            assert float((near / far).max()) < share


def test_less_weight_on_questions_brings_the_replies_closer(base: BaseModel) -> None:
    site, words = find_sites(base.model)[-1:], TEXT.split()
    context = document_ids(base.tokenizer, TEXT[:200])
    held = [
        Conversation("question", context, " ".join(words[i : i + 9]), document_ids(base.tokenizer, words[-i - 1]))
        for i in range(40)
    ]
    lessons = teach(base, held, [site[0].layer])

    def far(weight: float) -> float:
        factors = fit(base, lessons, [], site, 8, 0.1, question_weight=weight)
        prefix = encode(base.tokenizer, base.prompt.prefix)
        total = 0.0
        for lesson in lessons:
            with torch.no_grad():
                _, hidden = read(prefix, [(lesson.question, lesson.reply)], base, [site[0].layer], factors)
            total += float((hidden - lesson.hidden)[0, len(lesson.question) - 1 :].square().sum())
        return total

    assert far(0.0) < far(0.1) < 0.98 * far(1.0)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_layer_makes_up_its_share_of_what_is_missing(base: BaseModel, share: float) -> None:
    """With hardly any ridge and few tokens, a module can put all of it right."""
    sites = find_sites(base.model)
    held = [Conversation("question", document_ids(base.tokenizer, TEXT[:200]), TEXT.split()[0], [5])]
    layers = [site.layer for site in sites]
    lessons = teach(base, held, layers)
    factors = fit(base, lessons, [], sites, 32, 1e-6, share=share)
    first = {sites[0].path: factors[sites[0].path]}
    with torch.no_grad():
        none, one, all_of_them = (differences(base, lessons, layers, f)[2] for f in (None, first, factors))
    torch.testing.assert_close((one / none)[0].sqrt(), torch.tensor(1 - share), atol=0.02, rtol=0.0)
    assert float((all_of_them / none)[-1]) < 0.01


def test_other_lessons_hold_the_student_where_it_is(base: BaseModel) -> None:
    site, words = find_sites(base.model)[-1:], TEXT.split()
    layer, prefix = [site[0].layer], encode(base.tokenizer, base.prompt.prefix)

    def told(context: list[int], first: int) -> list[Lesson]:
        asked = [words[(first + i) % len(words) :][:3] for i in range(40)]
        replies = [document_ids(base.tokenizer, word) for word in reversed(words[:40])]
        pairs = zip(asked, replies, strict=True)
        return teach(base, [Conversation("question", context, " ".join(q), r) for q, r in pairs], layer)

    about, others = told(document_ids(base.tokenizer, TEXT[:200]), 0), told([], 20)

    def moved(weight: float) -> float:
        factors = fit(base, about, [], site, 8, 0.1, others=others, other_weight=weight)
        with torch.no_grad():
            _, hidden = read(prefix, [(x.question, x.reply) for x in others], base, layer, factors)
        return float((hidden - torch.cat([x.hidden for x in others], dim=1)).square().sum())

    assert moved(1.0) < 0.7 * moved(0.0)


def attended(base: BaseModel, sites: list[Site], lessons: list[Lesson], factors: Factors | None) -> torch.Tensor:
    """What the student's attention puts out, (layers, tokens, d_model)."""
    modules = torch.nn.ModuleList(base.model.get_submodule(site.path.rpartition(".")[0]) for site in sites)
    with states(modules, range(len(sites))) as found:
        read(encode(base.tokenizer, base.prompt.prefix), [(x.question, x.reply) for x in lessons], base, [0], factors)
    tokens = sum(len(lesson.question) + len(lesson.reply) - 1 for lesson in lessons)
    return torch.stack([found[number][0, -tokens:] for number in range(len(sites))])
