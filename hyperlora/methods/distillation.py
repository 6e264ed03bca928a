"""Context distillation: a LoRA trained, for every document, to answer without it as the model answers with it.

Askell et al. 2021 (arXiv 2112.00861) and Snell et al. 2022 (arXiv 2209.15189), in the strong form of Cartridges
(Eyuboglu et al. 2025, arXiv 2506.06266): the training questions come from the model itself (self_study.py), the loss is
the KL divergence to the teacher's likeliest tokens at every position of its replies, mixed with the likelihood of the
likeliest one (soft and hard targets; Hinton et al. 2015, arXiv 1503.02531), and the distance from its hidden states
(teaching.py), and training stops when held-out conversations get worse. It starts from the LoRA that brings the hidden
states close in closed form (regression.py).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from hyperlora import __version__
from hyperlora.files import sha256
from hyperlora.inject import Factors
from hyperlora.memory import Memory
from hyperlora.methods.adapted import fresh_adapter
from hyperlora.methods.contract import Document, Method, MethodSettings, stable_seed
from hyperlora.methods.regression import fit
from hyperlora.methods.self_study import COPIES, Conversation, chat, study
from hyperlora.methods.teaching import Lesson, differences, teach
from hyperlora.patch import Patch, Provenance
from hyperlora.prompt import document_ids
from hyperlora.structure import Site, attention_outputs, decoder_layers, find_sites, is_transposed


class Distillation(Method):
    """A LoRA per document, fitted to the model's own answers about it and trained on them by gradient descent."""

    name = "distillation"
    revision = 10
    seeded = True
    compresses = True
    sized_by = ("rank", "layers", "modules")

    class Settings(MethodSettings):
        """Settings of the training.

        Attributes:
            rank, layers, modules: of the LoRA; None takes all layers, and the output projections of attention and MLP.
            conversations, reply_tokens: self-study of one document.
            ridge, question_weight, strength: of the regression that these projections start from (regression.py), and a
                factor on what it gives, which ridge makes too weak; a ridge of None starts from zero. It is done twice,
                with half of the rank and half of the conversations each: once every layer makes up all of what is
                missing, once `share` of it. The start is the mean of both, because what each gets wrong by chance
                differs.
            chats, chat_weight: conversations about anything else, which the regression is to leave as they are.
            hard_weight: of the negative log-likelihood of the teacher's likeliest token; the KL divergence has weight
                1. Answers are decoded greedily, and this makes the student surer of them than the teacher is.
            hidden_weight: of the squared distance from the teacher's hidden states behind `matched` of the layers, each
                layer's in units of the bare model's distance.
            steps, batch: most optimizer steps (0: only the regression), and conversations to a step.
            learning_rate: of Adam, after `warmup` steps, falling linearly to a tenth.
            check, patience: every `check` steps the held-out conversations (one in 16 of those that are no copies) are
                scored; training stops after `patience` scores in a row that are not the best, and the best is kept. The
                default `steps` are over with the third score, so that they only keep the best.
        """

        rank: int = Field(512, gt=1)
        layers: list[int] | None = Field(None, min_length=1)
        modules: list[str] | None = Field(None, min_length=1)
        conversations: int = Field(320, ge=16)
        reply_tokens: int = Field(32, gt=1)
        ridge: float | None = Field(0.04, gt=0)
        question_weight: float = Field(0.1, ge=0)
        strength: float = Field(1.1, gt=0)
        share: float = Field(0.5, gt=0, le=1)
        chats: int = Field(48, ge=0)
        chat_weight: float = Field(0.05, ge=0)
        hard_weight: float = Field(0.25, ge=0)
        hidden_weight: float = Field(1.0, ge=0)
        matched: int = Field(5, gt=0)
        steps: int = Field(24, ge=0)
        batch: int = Field(8, gt=0)
        learning_rate: float = Field(1e-4, gt=0)
        warmup: int = Field(5, ge=0)
        check: int = Field(8, gt=0)
        patience: int = Field(3, gt=0)

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory(patch=self._patch(document)) for document in documents]

    def prepare(self) -> None:
        if self.settings.ridge:
            self._chats  # noqa: B018 (made once)

    @cached_property
    def _chats(self) -> list[Conversation]:
        return chat(self.base, self.seed, self.settings.chats) if self.settings.chats else []

    def _patch(self, document: Document) -> Patch:
        settings, base = self.settings, self.base
        count = len(decoder_layers(base.model)[1])
        layers = list(range(count)) if settings.layers is None else settings.layers
        # The adapted layers whose output is matched, evenly spread, the last one included.
        matched = sorted({layers[-1 - i * len(layers) // settings.matched] for i in range(settings.matched)})
        attention, mlp = attention_outputs(base.model, layers), find_sites(base.model, layers)
        sites = [*attention, *mlp] if settings.modules is None else find_sites(base.model, layers, settings.modules)
        factors = fresh_adapter(base, settings.rank, sites, stable_seed(self.seed, document.id))
        attention, mlp = ([s for s in kind if settings.ridge and s in sites] for kind in (attention, mlp))
        known = sorted({*matched, *(site.layer for site in mlp)})
        asked = (document, self.seed, settings.conversations, settings.reply_tokens)
        held = self.once(("self-study", *asked), lambda: study(base, *asked))
        lessons = teach(base, held, known, attention)
        copies = [x for x, c in zip(lessons, held, strict=True) if c.manner in COPIES]
        answers = [x for x, c in zip(lessons, held, strict=True) if c.manner not in COPIES]
        rng = random.Random(f"{self.seed}/{document.id}")
        rng.shuffle(answers)
        split = max(1, len(answers) // 16)
        unseen, trained = answers[:split], answers[split:] + copies
        if attention or mlp:
            factors |= self._start(trained, known, attention, mlp)
        unseen, trained = _behind(unseen, known, matched), _behind(trained, known, matched)
        kept = self._train(factors, trained, unseen, matched, rng)
        final = {path: (a[0], b[0]) for path, a, b in zip(factors, kept[::2], kept[1::2], strict=True)}
        return Patch(final, self._provenance(document, next(iter(final))))

    def _start(
        self, lessons: Sequence[Lesson], known: Sequence[int], attention: Sequence[Site], mlp: Sequence[Site]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A (1, rank, d_in) and B (1, d_out, rank) of every site: `strength` times the mean of the two regressions."""
        settings, base = self.settings, self.base
        layers, half = [site.layer for site in mlp], settings.rank // 2
        told = _behind(lessons, known, layers)
        chats = _behind(teach(base, self._chats, known, attention), known, layers)

        def fitted(part: Sequence[Lesson], rank: int, share: float) -> dict[str, tuple[Tensor, Tensor]]:
            weights = {"question_weight": settings.question_weight, "other_weight": settings.chat_weight}
            assert settings.ridge is not None
            return fit(base, part, attention, mlp, rank, settings.ridge, others=chats, share=share, **weights)

        whole, partly = fitted(told[::2], settings.rank - half, 1.0), fitted(told[1::2] or told, half, settings.share)
        return {
            path: (
                torch.cat([a, partly[path][0]], dim=1),
                torch.cat([b, partly[path][1]], dim=2) * (settings.strength / 2),
            )
            for path, (a, b) in whole.items()
        }

    def _train(
        self,
        factors: dict[str, tuple[Tensor, Tensor]],
        trained: Sequence[Lesson],
        unseen: Sequence[Lesson],
        matched: Sequence[int],
        rng: random.Random,
    ) -> list[Tensor]:
        """A and B of every site in turn, as they were when the unseen lessons were best."""
        settings, base = self.settings, self.base
        tensors = [tensor.requires_grad_() for pair in factors.values() for tensor in pair]
        optimizer = torch.optim.Adam(tensors, lr=settings.learning_rate)
        far = self._score(None, unseen, matched)[1]
        best, kept, worse = self._score(factors, unseen, matched)[0], [t.detach().clone() for t in tensors], 0
        queue: list[Lesson] = []
        for step in range(settings.steps):
            if len(queue) < settings.batch:
                queue += rng.sample(trained, len(trained))
            rate = min(1.0, (step + 1) / (settings.warmup + 1)) * (1 - 0.9 * step / settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            batch, queue = queue[: settings.batch], queue[settings.batch :]
            optimizer.zero_grad()
            kl, surprise, distance = differences(base, batch, matched, factors)
            (kl + settings.hard_weight * surprise + settings.hidden_weight * (distance / far).mean()).backward()
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            optimizer.step()
            if (step + 1) % settings.check == 0 or step + 1 == settings.steps:
                score = self._score(factors, unseen, matched)[0]
                worse = 0 if score < best else worse + 1
                if score < best:
                    best, kept = score, [tensor.detach().clone() for tensor in tensors]
                if worse == settings.patience:
                    break
        return kept

    @torch.no_grad()
    def _score(self, factors: Factors | None, lessons: Sequence[Lesson], layers: Sequence[int]) -> tuple[float, Tensor]:
        """The loss at the replies, and the distance from the hidden states, over any number of lessons: the mean over
        batches weighted by their lessons."""
        size, loss, distance = self.settings.batch, 0.0, torch.zeros(len(layers), device=self.base.device)
        for part in (lessons[i : i + size] for i in range(0, len(lessons), size)):
            kl, surprise, far = differences(self.base, part, layers, factors)
            loss += float(kl + self.settings.hard_weight * surprise) * len(part) / len(lessons)
            distance += far * len(part) / len(lessons)
        return loss, distance

    def _provenance(self, document: Document, path: str) -> Provenance:
        tokens = len(document_ids(self.base.tokenizer, document.text))
        return Provenance(
            base=self.base.name,
            fingerprint=self.base.fingerprint,
            generator=self.name,
            documents=({"sha256": sha256(document.text.encode()), "tokens": tokens, "weight": 1.0},),
            version=__version__,
            transposed=is_transposed(self.base.model.get_submodule(path)),
        )


def _behind(lessons: Sequence[Lesson], known: Sequence[int], layers: Sequence[int]) -> list[Lesson]:
    """Lessons with hidden states behind `layers` only, of those behind the layers that are `known`."""
    chosen = [known.index(layer) for layer in layers]
    return [replace(lesson, hidden=lesson.hidden[chosen]) for lesson in lessons]
