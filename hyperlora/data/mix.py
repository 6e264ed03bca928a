"""Weighted mixtures of item streams that reshuffle by document at every epoch and resume exactly."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from hyperlora.data.facts import RESERVED, fact_document
from hyperlora.data.items import Item, Question, is_text
from hyperlora.data.made_questions import ask_about
from hyperlora.data.open_words import OpenWords
from hyperlora.data.sources import load
from hyperlora.errors import InputError
from hyperlora.prompt import document_ids, whole
from hyperlora.recipe import FactsTask, MadeTask, QATask, TextTask

_NO_SPACES = 40  # characters to a space; a language that has so few has about two characters to a word
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


class Stream(Protocol):
    """An endless stream of training items: `item(n)` is a pure function of the number of items drawn before."""

    def item(self, number: int) -> Item: ...


class FactStream:
    """Invented facts, `task.facts` (a range) to a document, alone or between the sentences of a haystack."""

    def __init__(self, task: FactsTask, seed: int, tokenizer: Any):
        self.task, self.seed, self.tokenizer = task, seed, tokenizer
        texts = [item for name in task.haystack for item in load(name)]
        self.haystack = DocumentStream(texts, seed, "haystack") if task.haystack else None
        sampled = [item for name in task.words for item in load(name)]
        self.words = OpenWords(sampled, RESERVED) if task.words else None

    def item(self, number: int) -> Item:
        rng = random.Random(f"{self.seed}/facts/{number}")
        item = fact_document(f"{self.seed}-{number}", rng.randint(*self.task.facts), "train", words=self.words)
        if self.haystack:
            around, _ = self.haystack.draw(number)
            piece, _ = window(self.tokenizer, around.text, rng, rng.randint(*self.task.tokens), 0)
            place = rng.choice([0, *(match.end() for match in _SENTENCE_END.finditer(piece)), len(piece)])
            item = replace(item, text=f"{piece[:place].rstrip()} {item.text} {piece[place:]}".strip())
        return _ask(item, rng, self.task.questions)


class DocumentStream:
    """Documents of data sets in a new order every epoch."""

    def __init__(self, items: list[Item], seed: int, tag: str):
        items = [item for item in items if is_text(item.text)]
        self.items, self.seed, self.tag = items, seed, tag
        if not items:
            raise InputError(f"no usable documents for the task {tag}: check its sources and max_tokens")
        self._epoch, self._order = -1, list(range(len(items)))

    def draw(self, number: int) -> tuple[Item, random.Random]:
        epoch, position = divmod(number, len(self.items))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.items)))
            random.Random(f"{self.seed}/{self.tag}/{epoch}").shuffle(self._order)
        return self.items[self._order[position]], random.Random(f"{self.seed}/{self.tag}/{number}")


class QAStream(DocumentStream):
    """Questions about documents that fit `max_tokens`."""

    def __init__(self, task: QATask, seed: int, tokenizer: Any):
        kept = [
            item
            for name in task.sources
            for item in load(name)
            if item.questions and len(document_ids(tokenizer, item.text)) <= task.max_tokens
        ]
        super().__init__(kept, seed, "qa")
        self.questions = task.questions

    def item(self, number: int) -> Item:
        item, rng = self.draw(number)
        return _ask(item, rng, self.questions)


class TextStream(DocumentStream):
    """Pieces of plain text with the text that follows them."""

    def __init__(self, task: TextTask, seed: int, tokenizer: Any):
        super().__init__([item for name in task.sources for item in load(name)], seed, "text")
        self.task, self.tokenizer = task, tokenizer

    def item(self, number: int) -> Item:
        item, rng = self.draw(number)
        length = rng.randint(*self.task.tokens)
        piece, following = window(self.tokenizer, item.text, rng, length, self.task.following)
        return Item(f"{item.id}@{number}", piece, following=following)


class MadeStream(DocumentStream):
    """Pieces of plain text with questions made from them; a piece that nothing can be asked about has none. Questions
    that the sources bring are left out."""

    def __init__(self, task: MadeTask, seed: int, tokenizer: Any):
        items = [replace(item, questions=()) for name in task.sources for item in load(name)]
        super().__init__(items, seed, "made")
        self.task, self.tokenizer = task, tokenizer

    def item(self, number: int) -> Item:
        item, rng = self.draw(number)
        piece, _ = window(self.tokenizer, item.text, rng, rng.randint(*self.task.tokens), 0)
        return Item(f"{item.id}@{number}", piece, ask_about(piece, rng, self.task.questions))


def window(tokenizer: Any, text: str, rng: random.Random, length: int, following: int) -> tuple[str, str]:
    """A random window of about `length` tokens that starts at a word, and about `following` tokens after it."""
    words, gap = text.split(" "), " "
    if len(text) > _NO_SPACES * len(words):
        words, gap = [text[start : start + 2] for start in range(0, len(text), 2)], ""
    span = max(2, int(0.7 * length))  # words are about 1.4 tokens; the encoder takes any length
    start = rng.randrange(max(1, len(words) - span - int(0.7 * following)))
    ids = tokenizer(gap.join(words[start : start + 2 * (span + following)]), add_special_tokens=False)["input_ids"]
    return whole(tokenizer, ids[:length]), whole(tokenizer, ids[length : length + following])


def _ask(item: Item, rng: random.Random, count: int) -> Item:
    questions: tuple[Question, ...] = item.questions
    if len(questions) > count:
        questions = tuple(rng.sample(questions, count))
    return replace(item, questions=questions)


class Mix:
    """Draws items from weighted streams. `state` (items drawn per stream) is all that resuming needs."""

    def __init__(self, tasks: list[FactsTask | QATask | TextTask | MadeTask], seed: int, tokenizer: Any):
        self.streams: list[Stream] = []
        for index, task in enumerate(tasks):
            own = seed * 1000 + index
            if isinstance(task, FactsTask):
                self.streams.append(FactStream(task, own, tokenizer))
            elif isinstance(task, QATask):
                self.streams.append(QAStream(task, own, tokenizer))
            elif isinstance(task, MadeTask):
                self.streams.append(MadeStream(task, own, tokenizer))
            else:
                self.streams.append(TextStream(task, own, tokenizer))
        self.tasks = tasks
        self.seed = seed
        self.state = [0] * len(tasks)

    def draw(self, step: int = 0) -> tuple[Item, random.Random]:
        """The next item, of a task that is drawn in this step, and a random generator of its own."""
        make, rng = self.pick(step)
        return make(), rng

    def pick(self, step: int = 0) -> tuple[Callable[[], Item], random.Random]:
        """As `draw`, but for the item itself, which is made when it is called for."""
        total = sum(self.state)
        rng = random.Random(f"{self.seed}/mix/{total}")
        weights = [task.weight if task.drawn_in(step) else 0.0 for task in self.tasks]
        index = rng.choices(range(len(self.streams)), weights)[0]
        make = partial(self.streams[index].item, self.state[index])
        self.state[index] += 1
        return make, rng

    def documents(self) -> list[Item]:
        """Every fixed document that can be drawn (invented ones are endless and left out)."""
        streams = [stream.haystack if isinstance(stream, FactStream) else stream for stream in self.streams]
        return [item for stream in streams if isinstance(stream, DocumentStream) for item in stream.items]
