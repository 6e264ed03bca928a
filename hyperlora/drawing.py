"""What the steps of a training run read and ask, as a function of the seed and of how much was drawn before."""

import itertools
import random
from collections.abc import Generator, Sequence
from typing import NamedTuple

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
    """The micro-batches of a step, and the position after it."""

    micro: list[Micro]
    after: Position


class Drawing:
    """Draws the documents of every step and lays out the student's rows.

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

    @property
    def position(self) -> Position:
        return Position(list(self.mix.state), self._unrelated_drawn)

    @position.setter
    def position(self, position: Position) -> None:
        self.mix.state, self._unrelated_drawn = list(position.mix), position.unrelated

    def steps(self, first: int) -> Generator[Step, None, None]:
        """Every step from number `first` on; moves the position."""
        for step in itertools.count(first):
            micro, count = [], self.recipe.documents
            drawn = [self.mix.draw(step) for _ in range(count * self.recipe.micro_batches)]
            for start in range(0, len(drawn), count):
                part = drawn[start : start + count]
                rows = [row for index, (item, rng) in enumerate(part) for row in self.student.rows(index, item, rng)]
                beside = self._beside([item for item, _ in drawn], start, [rng for _, rng in part])
                micro.append(Micro([item for item, _ in part], rows, beside, self._unrelated()))
            yield Step(micro, self.position)

    def _beside(self, drawn: Sequence[Item], start: int, rngs: Sequence[random.Random]) -> list[Row]:
        """For a share of the documents from number `start` of the step on, one question about the next one."""
        rows: list[Row] = []
        if self.recipe.beside is not None:
            for index, rng in enumerate(rngs):
                other = drawn[(start + index + 1) % len(drawn)]
                if rng.random() < self.recipe.beside.share and other.questions:
                    rows.append(self.student.beside(index, other, rng.choice(other.questions)))
        return rows

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
