import pytest

from hyperlora import ranks
from hyperlora.data.items import Item
from hyperlora.drawing import Drawing, Step
from hyperlora.recipe import Recipe
from hyperlora.student import Student

from .conftest import make_base


def drawing(recipe: Recipe) -> Drawing:
    base = make_base()
    return Drawing(recipe, base, Student(base, recipe, [0]))


def test_processes_draw_together_what_one_draws_and_make_no_more_of_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of questions, of prompts beside a patch and of unrelated text, and where the run stands after them."""
    recipe.documents, recipe.micro_batches = 2, 4

    def three_steps() -> tuple[list[Step], int]:
        made: list[str] = []
        own = drawing(recipe)
        for stream in own.mix.streams:

            def item(number: int, make=stream.item) -> Item:  # type: ignore[no-untyped-def]
                made.append("")
                return make(number)

            stream.item = item  # type: ignore[method-assign]
        steps = own.steps(0)
        return [next(steps) for _ in range(3)], len(made)

    whole, made = three_steps()
    assert made == 3 * 8 and all(len(step.micro) == 4 for step in whole)
    assert any(part.beside for step in whole for part in step.micro)
    assert any(part.unrelated for step in whole for part in step.micro)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "own", lambda rank=rank: rank)
        share, made = three_steps()
        # Its own, and those of the other that its prompts ask about.
        assert 3 * 4 <= made < 3 * 8
        for mine, every in zip(share, whole, strict=True):
            assert mine.micro == every.micro[rank::2] and mine.after == every.after
