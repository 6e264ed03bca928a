"""Context distillation: a LoRA trained, for every document, to answer without it as the model answers with it.

Askell et al. 2021 (arXiv 2112.00861) and Snell et al. 2022 (arXiv 2209.15189), in the strong form of Cartridges
(Eyuboglu et al. 2025, arXiv 2506.06266): the training questions come from the model itself (self_study.py), the loss is
the KL divergence to the teacher's likeliest tokens at every position of its replies, and training stops when held-out
conversations get worse.
"""

import random
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from hyperlora import __version__
from hyperlora.files import sha256
from hyperlora.memory import Memory
from hyperlora.methods.adapted import fresh_adapter
from hyperlora.methods.contract import Document, Method, MethodSettings, stable_seed
from hyperlora.methods.self_study import Conversation, study
from hyperlora.objectives import top_k_kl
from hyperlora.packing import pack
from hyperlora.patch import Patch, Provenance
from hyperlora.prompt import encode
from hyperlora.session import Session
from hyperlora.structure import decoder_layers, is_transposed


class Distillation(Method):
    """A LoRA per document, trained by gradient descent on the model's own answers about it."""

    name = "distillation"
    seeded = True
    compresses = True

    class Settings(MethodSettings):
        """Settings of the training.

        Attributes:
            rank, layers, modules: of the LoRA; None takes the upper half of the layers and the MLP's output projection.
            conversations, reply_tokens: self-study of one document.
            steps, batch: most optimizer steps, and conversations to a step.
            learning_rate: of Adam, after `warmup` steps, falling linearly to a tenth.
            check, patience: every `check` steps the held-out conversations (one in eight) are scored; training stops
                after `patience` scores in a row that are not the best, and the best is kept.
        """

        rank: int = Field(16, gt=0)
        layers: list[int] | None = None
        modules: list[str] | None = None
        conversations: int = Field(32, ge=8)
        reply_tokens: int = Field(32, gt=1)
        steps: int = Field(96, gt=0)
        batch: int = Field(8, gt=0)
        learning_rate: float = Field(5e-3, gt=0)
        warmup: int = Field(5, ge=0)
        check: int = Field(24, gt=0)
        patience: int = Field(3, gt=0)

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory(patch=self._patch(document)) for document in documents]

    def _patch(self, document: Document) -> Patch:
        settings, base = self.settings, self.base
        held = study(base, document, self.seed, settings.conversations, settings.reply_tokens)
        rng = random.Random(f"{self.seed}/{document.id}")
        recitations = [c for c in held if c.manner == "recitation"]
        others = [c for c in held if c.manner != "recitation"]
        rng.shuffle(others)
        unseen, trained = others[: len(others) // 8], others[len(others) // 8 :] + recitations
        count = len(decoder_layers(base.model)[1])
        layers = list(range(count // 2, count)) if settings.layers is None else settings.layers
        factors = fresh_adapter(base, settings.rank, layers, stable_seed(self.seed, document.id), settings.modules)
        tensors = [tensor for pair in factors.values() for tensor in pair]
        optimizer = torch.optim.Adam(tensors, lr=settings.learning_rate)
        best, kept, worse = self._loss(factors, unseen), [tensor.detach().clone() for tensor in tensors], 0
        queue: list[Conversation] = []
        for step in range(settings.steps):
            if len(queue) < settings.batch:
                queue += rng.sample(trained, len(trained))
            rate = min(1.0, (step + 1) / (settings.warmup + 1)) * (1 - 0.9 * step / settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            batch, queue = queue[: settings.batch], queue[settings.batch :]
            optimizer.zero_grad()
            self._kl(factors, batch).backward()
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            optimizer.step()
            if (step + 1) % settings.check == 0 or step + 1 == settings.steps:
                score = self._loss(factors, unseen)
                worse = 0 if score < best else worse + 1
                if score < best:
                    best, kept = score, [tensor.detach().clone() for tensor in tensors]
                if worse == settings.patience:
                    break
        pairs = zip(kept[::2], kept[1::2], strict=True)
        final = {path: (a[0], b[0]) for path, (a, b) in zip(factors, pairs, strict=True)}
        return Patch(final, self._provenance(document, next(iter(final))))

    def _kl(self, factors: dict[str, tuple[Tensor, Tensor]], conversations: Sequence[Conversation]) -> Tensor:
        """Nats per token."""
        base = self.base
        parts = [(base.prompt.question_ids(base.tokenizer, c.question), c.reply) for c in conversations]
        packed = pack(encode(base.tokenizer, base.prompt.prefix), parts, base.device)
        with Session(base, 1, factors=factors, cached=False) as session:
            logits = packed.logits(session)
        ids = torch.cat([conversation.top_ids for conversation in conversations]).to(base.device)
        log_probs = torch.cat([conversation.top_log_probs for conversation in conversations]).to(base.device)
        return top_k_kl(logits, ids, log_probs) / len(ids)

    @torch.no_grad()
    def _loss(self, factors: dict[str, tuple[Tensor, Tensor]], conversations: Sequence[Conversation]) -> float:
        size = self.settings.batch
        parts = [conversations[i : i + size] for i in range(0, len(conversations), size)]
        return sum(float(self._kl(factors, part)) * len(part) for part in parts) / len(conversations)

    def _provenance(self, document: Document, path: str) -> Provenance:
        tokens = len(self.base.tokenizer(document.text, add_special_tokens=False)["input_ids"])
        return Provenance(
            base=self.base.name,
            fingerprint=self.base.fingerprint,
            generator=self.name,
            documents=({"sha256": sha256(document.text.encode()), "tokens": tokens, "weight": 1.0},),
            version=__version__,
            transposed=is_transposed(self.base.model.get_submodule(path)),
        )
