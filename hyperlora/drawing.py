"""What the steps of a training run read and ask, as a function of the seed and of how much was drawn before."""

import itertools
import random
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import NamedTuple

from hyperlora import ranks
from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item
from hyperlora.data.mix import DocumentStream, Mix, window
from hyperlora.data.sources import load
from hyperlora.objectives import Row
from hyperlora.recipe import Recipe
from hyperlora.student import Student


class Micro(NamedTuple):
    """Documents, and rows of what is asked of them, of what prompts say beside their patches, and of unrelated text."""

    items: list[Item]
    rows: list[Row]
    beside: list[Row]
    unrelated: list[Row]


class Position(NamedTuple):
    """How much has been drawn: documents, by task of the mix, and unrelated texts."""

    mix: list[int]
    unrelated: int


class Step(NamedTuple):
    """This process's micro-batches of a step, and the position after all of them."""

    micro: list[Micro]
    after: Position


class Drawing:
    """Draws the documents of every step and lays out the student's rows. What is drawn depends on nothing but the
    recipe; of several processes each makes what it needs of it.

    Raises:
        InputError: a source of the recipe cannot be read or has no documents.
    """

    def __init__(self, recipe: Recipe, base: BaseModel, student: Student):
        self.recipe, self.base, self.student = recipe, base, student
        self.mix = Mix(list(recipe.mix), recipe.seed, base.tokenizer)
        self.unrelated: DocumentStream | None = None
        if recipe.unrelated:
            texts = [item for source in recipe.unrelated.sources for item in load(source)]
            self.unrelated = DocumentStream(texts, recipe.seed, "unrelated")
        self._unrelated_drawn = 0
        self._own = range(ranks.own(), recipe.micro_batches, ranks.count())

    @property
    def position(self) -> Position:
        return Position(list(self.mix.state), self._unrelated_drawn)

    @position.setter
    def position(self, position: Position) -> None:
        self.mix.state, self._unrelated_drawn = list(position.mix), position.unrelated

    def steps(self, first: int) -> Generator[Step, None, None]:
        """Every step from number `first` on; moves the position."""
        count, number = self.recipe.documents, self.recipe.micro_batches
        for step in itertools.count(first):
            drawn = _Drawn([self.mix.pick(step) for _ in range(count * number)])
            micro = []
            for part in range(number):
                if part in self._own:
                    micro.append(self._micro(drawn, part * count))
                elif self.unrelated:
                    self._unrelated_drawn += count
            yield Step(micro, self.position)

    def _micro(self, drawn: "_Drawn", start: int) -> Micro:
        """The micro-batch whose first document is number `start` of the step."""
        items, rows, beside = [], [], []
        for index, number in enumerate(range(start, start + self.recipe.documents)):
            item, rng = drawn.item(number), drawn.rngs[number]
            items.append(item)
            rows += self.student.rows(index, item, rng)
            if self.recipe.beside is not None and rng.random() < self.recipe.beside.share:
                other = drawn.item((number + 1) % len(drawn.rngs))
                if other.questions:
                    beside.append(self.student.beside(index, other, rng.choice(other.questions)))
        return Micro(items, rows, beside, self._unrelated())

    def _unrelated(self) -> list[Row]:
        """Text that has nothing to do with the documents, for a share of them."""
        if self.unrelated is None or self.recipe.unrelated is None:
            return []
        setting, rows = self.recipe.unrelated, []
        for index in range(self.recipe.documents):
            item, rng = self.unrelated.draw(self._unrelated_drawn)
            self._unrelated_drawn += 1
            if rng.random() < setting.share:
                text, _ = window(self.base.tokenizer, item.text, rng, setting.tokens, 0)
                rows.append(self.student.text(index, text, rng.random() < setting.in_prompt))
        return [row for row in rows if row.labels > 0]


class _Drawn:
    """The documents of a step, each made when it is first wanted, and their random generators."""

    def __init__(self, picked: Sequence[tuple[Callable[[], Item], random.Random]]):
        self.rngs = [rng for _, rng in picked]
        self._make = [cache(make) for make, _ in picked]

    def item(self, number: int) -> Item:
        return self._make[number]()
