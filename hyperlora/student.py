"""The student of a training run: what it is asked with a patch on, and how far it is from what it should say."""

import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from hyperlora.attention import attention
from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item, Question
from hyperlora.data.teacher import TeacherCorpus
from hyperlora.errors import InputError
from hyperlora.groups import cheapest_groups
from hyperlora.inject import Factors, inject
from hyperlora.objectives import (
    Row,
    collate,
    cross_entropy,
    kl_from_bare,
    label_logits,
    reply_loss,
    state_distance,
    state_spread,
    states,
)
from hyperlora.packing import Packed, pack_alike, stacked
from hyperlora.prompt import document_ids, encode
from hyperlora.recipe import Recipe
from hyperlora.session import Session, takes_masks
from hyperlora.structure import context_window, decoder_layers

# Tokens of text: what a continuation starts from, what a document's own text goes on for behind as many, and how many
# of those nobody could tell.
BEFORE, RECALLED, UNSCORED = 16, 48, 4


class Student:
    """The frozen base with patches on.

    Args:
        sink: the tokens that a text without a chat format starts with.

    Raises:
        InputError: a teacher's corpus cannot be read, or is of another base.
    """

    def __init__(self, base: BaseModel, recipe: Recipe, sink: list[int]):
        self.base, self.recipe, self.sink = base, recipe, sink
        self.teachers = [TeacherCorpus(Path(folder), base) for folder in recipe.teacher.corpora]
        if len({corpus.top_k for corpus in self.teachers}) > 1:
            raise InputError(
                f"{', '.join(recipe.teacher.corpora)}: replies with different --top-k; make them with the same one"
            )
        self.blocks = decoder_layers(base.model)[1]
        count = min(recipe.teacher.hidden_layers, len(self.blocks)) if recipe.teacher.hidden else 0
        self.matched = [len(self.blocks) * (i + 1) // count - 1 for i in range(count)]
        self.spread = torch.ones(count)
        self.packs = takes_masks(base)  # what a document's questions begin with alike is read once

    @torch.no_grad()
    def measure(self, texts: Sequence[str]) -> None:
        """Take the units of the distance from the teacher's hidden states from generic text."""
        start = max(1, len(self.sink))  # where a text begins states are large, whatever it says
        tokens = min(self.recipe.calibration.tokens, context_window(self.base.model) - len(self.sink))
        rows = [Row(0, self.sink + document_ids(self.base.tokenizer, text)[:tokens], start + 1) for text in texts]
        self.spread = state_spread(torch.cat([self._states([row]) for row in rows if row.labels > 0], dim=1))

    def check_taught(self, documents: Sequence[Item]) -> None:
        """Raises InputError when there are teachers' replies, and to no question about these documents."""
        asked = ((item.text, question.text) for item in documents for question in item.questions)
        if self.teachers and not any(corpus.find(*pair) for pair in asked for corpus in self.teachers):
            raise InputError(
                f"{', '.join(self.recipe.teacher.corpora)}: no reply to any question that the recipe draws; run "
                "hyperlora teach on the sources of its qa task"
            )

    # -- what it is asked ---------------------------------------------------------------------------------------------

    def rows(self, index: int, item: Item, rng: random.Random) -> list[Row]:
        """Rows of document number `index`: its questions, else its own text and what follows it."""
        return self._questions(index, item) if item.questions else self._continuations(index, item, rng)

    def text(self, index: int, text: str, in_prompt: bool = False) -> Row:
        """Plain text, or a prompt's document, scored from its second token on."""
        before = encode(self.base.tokenizer, self.base.prompt.prefix) if in_prompt else self.sink
        return self._fits(Row(index, before + document_ids(self.base.tokenizer, text), len(before) + 1))

    def beside(self, index: int, other: Item, question: Question) -> Row:
        """A row of document number `index` that asks about another document, which is in the prompt."""
        prompt, tokenizer = self.base.prompt, self.base.tokenizer
        asked = prompt.prompt_ids(tokenizer, question.text, other.text)
        return self._fits(Row(index, asked + prompt.answer_ids(tokenizer, question.reply), len(asked)))

    def _fits(self, row: Row) -> Row:
        """Raises InputError where a row is beyond the base's window."""
        window = context_window(self.base.model)
        if (length := max(len(row.ids), len(row.told or ()))) > window:
            raise InputError(
                f"{length} tokens of a document and what is asked are beyond the window of {self.base.name}, {window}; "
                "lower max_tokens or tokens of the recipe's tasks, or take another base"
            )
        return row

    def _questions(self, index: int, item: Item) -> list[Row]:
        prompt_ids, tokenizer = self.base.prompt.prompt_ids, self.base.tokenizer
        rows = []
        for question in item.questions:
            taught = next(filter(None, (corpus.find(item.text, question.text) for corpus in self.teachers)), None)
            likeliest = None
            if taught is None:
                reply = self.base.prompt.answer_ids(tokenizer, question.reply)
            else:
                reply, weight = taught.reply, 1 + self.recipe.teacher.contrast * taught.gain.clamp(0, 5)
                likeliest = taught.top_ids, taught.top_log_probs, weight
            prompt = prompt_ids(tokenizer, question.text)
            told = prompt_ids(tokenizer, question.text, item.text) + reply if self.matched else None
            rows.append(self._fits(Row(index, prompt + reply, len(prompt), likeliest, told)))
        return rows

    def _continuations(self, index: int, item: Item, rng: random.Random) -> list[Row]:
        own, following = (document_ids(self.base.tokenizer, text) for text in (item.text, item.following))
        begin = rng.randrange(max(1, len(own) - BEFORE - RECALLED))
        piece = own[begin : begin + BEFORE + RECALLED]
        rows = [Row(index, self.sink + piece, len(self.sink) + min(UNSCORED, len(piece) - 1))]
        if following:
            before = self.sink + own[-BEFORE:]
            rows.append(Row(index, before + following, len(before)))
        return rows

    # -- how far it is off -------------------------------------------------------------------------------------------

    def losses(self, factors: Factors, rows: list[Row], labels: int) -> dict[str, float]:
        """Leave the gradient of the rows' losses in the factors; these rows' parts of the means over the step.

        Args:
            factors: leaves; see `inject`.
            labels: of the whole step.

        Returns:
            loss, nats per label; hidden, `state_distance` per label, where the recipe wants it.
        """
        parts = {"loss": 0.0} | ({"hidden": 0.0} if self.matched else {})
        if not self.packs:
            for group in self._groups(rows):
                _add(parts, self._losses(factors, group, labels))
            return parts
        runs = [list(found) for _, found in groupby(rows, key=lambda row: row.document)]
        packs = [self._packed(run) for run in runs]
        for numbers in cheapest_groups([packed.ids.shape[1] for packed in packs], self.base.device):
            group = [row for number in numbers for row in runs[number]]
            _add(parts, self._losses(factors, group, labels, stacked([packs[number] for number in numbers])))
        return parts

    def _packed(self, rows: list[Row]) -> Packed:
        return pack_alike([(row.ids[: row.start], row.ids[row.start :]) for row in rows], self.base.device)

    def _losses(self, factors: Factors, rows: list[Row], labels: int, packed: Packed | None = None) -> dict[str, float]:
        """Of rows that run together: those of a document in one sequence where they are `packed`."""
        model, batch, teacher = self.base.model, collate(rows, self.base.device), self._told(rows)
        documents = batch.documents if packed is None else batch.documents.unique_consecutive()
        labelled = batch.labelled if packed is None else packed.wanted
        fast = attention(self.base, (batch.ids if packed is None else packed.ids).shape[1])
        with fast, inject(model, factors, documents), states(self.blocks, self.matched) as found:
            if packed is None:
                logits = label_logits(model, batch)
            else:
                with Session(self.base, len(packed.ids), cached=False) as session:
                    logits = packed.logits(session)
            loss = reply_loss(logits, batch, self.recipe.teacher.nll) / labels
            parts, total = {"loss": float(loss.detach())}, loss
            if teacher is not None:
                where = torch.tensor([bool(row.told) for row in rows for _ in range(row.labels)])
                own = torch.stack([found[layer][labelled].float() for layer in self.matched])
                far = state_distance(own[:, where.to(own.device)], teacher, self.spread.to(own.device)) / labels
                parts["hidden"], total = float(far.detach()), loss + self.recipe.teacher.hidden * far
            total.backward()
        return parts

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        """Rows to run together, each in a sequence of its own."""
        groups = cheapest_groups([len(row.ids) for row in rows], self.base.device)
        return [[rows[number] for number in group] for group in groups]

    @torch.no_grad()
    def _told(self, rows: list[Row]) -> Tensor | None:
        """Hidden states (layers, labels, d_model) of the base that reads the documents, at the labels of questions."""
        told = [Row(0, row.told, len(row.told) - row.labels) for row in rows if row.told]
        return self._states(told) if told else None

    def _states(self, rows: list[Row]) -> Tensor:
        """Hidden states (layers, labels, d_model) of the bare base, behind the layers that are matched."""
        parts: dict[int, Tensor] = {}  # by row
        for numbers in cheapest_groups([len(row.ids) for row in rows], self.base.device):
            group = [rows[number] for number in numbers]
            batch = collate(group, self.base.device)
            with states(self.blocks, self.matched) as found:
                self.base.model.base_model(input_ids=batch.ids, use_cache=False)
            own = torch.stack([found[layer][batch.labelled].float() for layer in self.matched])
            parts |= dict(zip(numbers, own.split([row.labels for row in group], dim=1), strict=True))
        return torch.cat([parts[number] for number in range(len(rows))], dim=1)

    def misled(self, factors: Factors, rows: list[Row], labels: int) -> float:
        """Leave the gradient of the weighted loss of `beside` rows in the factors; the rows' part of its mean."""
        assert self.recipe.beside is not None
        model, total = self.base.model, 0.0
        for group in self._groups(rows):
            batch = collate(group, self.base.device)
            with attention(self.base, batch.ids.shape[1]), inject(model, factors, batch.documents):
                loss = cross_entropy(model, batch) / labels
                (self.recipe.beside.weight * loss).backward()
            total += float(loss.detach())
        return total

    def drift(self, factors: Factors, rows: list[Row], labels: int) -> float:
        """Leave the gradient of the weighted KL to the bare model in the factors; the rows' part of its mean."""
        assert self.recipe.unrelated is not None
        model, total = self.base.model, 0.0
        for group in self._groups(rows):
            batch = collate(group, self.base.device)
            with torch.no_grad():
                bare = label_logits(model, batch)
            with attention(self.base, batch.ids.shape[1]), inject(model, factors, batch.documents):
                drift = kl_from_bare(model, batch, bare) / labels
                (self.recipe.unrelated.weight * drift).backward()
            total += float(drift.detach())
        return total


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    for name, number in more.items():
        sums[name] += number
