"""What a teacher that sees the document makes of a conversation, and how far a student without it is from that."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyperlora.base_model import BaseModel
from hyperlora.inject import Factors
from hyperlora.methods.self_study import Conversation
from hyperlora.objectives import states, top_k_kl
from hyperlora.packing import pack
from hyperlora.prompt import GAP, encode
from hyperlora.session import Session
from hyperlora.structure import Site, decoder_layers


@dataclass(frozen=True)
class Lesson:
    """One conversation without its document.

    Attributes:
        question, reply: token ids after the chat's prefix.
        top_ids, top_log_probs: the teacher's likeliest tokens at every token of the reply, (reply tokens, k).
        hidden: the teacher's hidden states behind some layers at the tokens of both, (layers, tokens, d_model).
        attention: what the attention of some layers adds to the residual stream there, (layers, tokens, d_model).
    """

    question: list[int]
    reply: list[int]
    top_ids: Tensor
    top_log_probs: Tensor
    hidden: Tensor
    attention: Tensor


@torch.no_grad()
def teach(
    base: BaseModel,
    conversations: Sequence[Conversation],
    layers: Sequence[int],
    attention: Sequence[Site] = (),
    top_k: int = 20,
    batch: int = 16,
) -> list[Lesson]:
    """Read every conversation with its document, if it has one, in the prompt, `batch` about the same text at a time.

    Args:
        layers: for the lessons' hidden states.
        attention: modules for what the attention adds; see `attention_outputs`.
    """
    lessons: list[Lesson | None] = [None] * len(conversations)
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, conversation in enumerate(conversations):
        by_context.setdefault(tuple(conversation.context), []).append(number)
    prefix, gap = encode(base.tokenizer, base.prompt.prefix), encode(base.tokenizer, GAP)
    for context, numbers in by_context.items():
        told = [*prefix, *context, *gap] if context else prefix
        for first in range(0, len(numbers), batch):
            group = [conversations[number] for number in numbers[first : first + batch]]
            parts = [(base.prompt.question_ids(base.tokenizer, c.question), c.reply) for c in group]
            with states(_modules(base, attention), range(len(attention))) as added:
                logits, hidden = read(told, parts, base, layers)
            outputs = [added[number][0, len(told) :].float() for number in range(len(attention))]
            values, ids = logits.topk(min(top_k, logits.shape[1]), dim=-1)
            values = values - logits.logsumexp(-1, keepdim=True)
            counts = [len(reply) for _, reply in parts]
            lengths = [len(question) + len(reply) - 1 for question, reply in parts]
            found = zip(
                parts,
                ids.split(counts),
                values.split(counts),
                hidden.split(lengths, dim=1),
                (torch.stack(outputs) if outputs else hidden[:0]).split(lengths, dim=1),
                strict=True,
            )
            for number, (part, *rest) in zip(numbers[first : first + batch], found, strict=True):
                lessons[number] = Lesson(*part, *rest)
    return [lesson for lesson in lessons if lesson is not None]


def _modules(base: BaseModel, sites: Sequence[Site]) -> nn.ModuleList:
    return nn.ModuleList(base.model.get_submodule(site.path) for site in sites)


def differences(
    base: BaseModel, lessons: Sequence[Lesson], layers: Sequence[int], factors: Factors | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a student without the documents: KL(teacher || student) and the negative log-likelihood of the teacher's
    likeliest token, both in nats per reply token, scalars; and the squared distance of its hidden states from the
    teacher's, the mean over tokens, (layers,)."""
    prefix = encode(base.tokenizer, base.prompt.prefix)
    logits, hidden = read(prefix, [(lesson.question, lesson.reply) for lesson in lessons], base, layers, factors)
    ids = torch.cat([lesson.top_ids for lesson in lessons])
    log_probs = torch.cat([lesson.top_log_probs for lesson in lessons])
    taught = torch.cat([lesson.hidden for lesson in lessons], dim=1)
    kl, surprise = top_k_kl(logits, ids, log_probs) / len(ids), cross_entropy(logits, ids[:, 0])
    return kl, surprise, (hidden - taught).square().sum(-1).mean(-1)


def read(
    prefix: list[int],
    parts: Sequence[tuple[list[int], list[int]]],
    base: BaseModel,
    layers: Sequence[int],
    factors: Factors | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (reply tokens, vocabulary) and hidden states (layers, tokens of all parts, d_model), both float32."""
    packed = pack(prefix, parts, base.device)
    with (
        Session(base, 1, factors=factors, cached=False) as session,
        states(decoder_layers(base.model)[1], layers) as found,
    ):
        logits = packed.logits(session)
    return logits, torch.stack([found[layer][0, len(prefix) :].float() for layer in layers])
