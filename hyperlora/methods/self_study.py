"""Conversations about a document that the model holds with itself, to learn from (Eyuboglu et al. 2025, Cartridges).

The model reads the document, is asked to ask something about it in one of five manners, and answers its own question
with the document in sight. What it would have said at every position, as the log-probabilities of its likeliest tokens,
is what a student without the document is trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, stable_seed
from hyperlora.methods.kv_cache import prefill
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime

# What the model is asked to write, by manner.
SEEDS: dict[str, tuple[str, ...]] = {
    "structuring": (
        "Write one request to put some of the information above into a list or a table. Name the part that is meant.",
        "Write one instruction that asks for the names, dates and numbers above in an orderly form.",
    ),
    "summarisation": (
        "Write one request to sum up a part of the text above. Name the part that is meant.",
        "Write one instruction that asks for the main points of the text above.",
    ),
    "question": (
        "Write one short question about a detail in the text above that the text answers.",
        "Write one question about a name, a number, a place or a date in the text above.",
        "Write one question that starts with Who, What, When, Where, Why or How and that the text above answers.",
        "Write a hard question that only a reader of the text above can answer.",
    ),
    "use case": (
        "Think of someone who needs the text above for their work, and write the question that they would ask.",
        "Write one practical question that the information above helps to settle.",
    ),
    "creative": (
        "Write one playful request about the people or things in the text above, such as a riddle or a short story.",
        "Write one request to explain something in the text above to a child.",
    ),
}
RECITE = "Repeat the text word for word."


@dataclass(frozen=True)
class Conversation:
    """A prompt without the document, the reply given with it, and the teacher's opinion at every reply token.

    top_ids, top_log_probs: (reply tokens, k).
    """

    manner: str
    question: str
    reply: list[int]
    top_ids: Tensor
    top_log_probs: Tensor


def study(
    base: BaseModel,
    document: Document,
    seed: int,
    conversations: int,
    reply_tokens: int = 48,
    chunk_tokens: int = 512,
    top_k: int = 20,
    temperature: float = 0.8,
) -> list[Conversation]:
    """`conversations` about the document, the manners in turn, and one recitation of every chunk of it.

    A conversation is about one chunk of at most `chunk_tokens`, because small models ask better about short texts.
    """
    runtime = Runtime(base)
    ids = document_ids(base.tokenizer, document.text)
    count = -(-len(ids) // chunk_tokens)
    bounds = [len(ids) * i // count for i in range(count + 1)]
    texts = [base.tokenizer.decode(ids[a:b]) for a, b in pairwise(bounds)]
    memories = [Memory(kv=prefill(base, text)) for text in texts]
    asked: list[tuple[str, str, int, int]] = []  # manner, instruction, chunk, seed of the sample
    for number in range(conversations):
        manner = list(SEEDS)[number % len(SEEDS)]
        own = stable_seed(seed, document.id, number)
        asked.append((manner, SEEDS[manner][own % len(SEEDS[manner])], number % count, own))
    instructions = [runtime.question(chunk, text) for _, text, chunk, _ in asked]
    questions = _texts(base, runtime.generate_ids(memories, instructions, 40, temperature, [own for *_, own in asked]))
    prompts = [runtime.question(chunk, q) for q, (_, _, chunk, _) in zip(questions, asked, strict=True)]
    replies = runtime.generate_ids(memories, prompts, reply_tokens)
    end = base.prompt.end_ids(base.tokenizer)[:1]
    held = [
        (manner, question, Prompt(prompt.memory, prompt.ids, reply + (end if len(reply) < reply_tokens else [])))
        for (manner, *_), question, prompt, reply in zip(asked, questions, prompts, replies, strict=True)
    ]
    for chunk, text in enumerate(texts):
        asking = RECITE if count == 1 else f"{RECITE} Start with: {' '.join(text.split()[:6])}"
        held.append(("recitation", asking, runtime.question(chunk, asking, text)))
    held = [conversation for conversation in held if conversation[2].reply]

    def opinion(logits: Tensor, _: Tensor) -> Tensor:
        values, ids = logits.log_softmax(-1).topk(min(top_k, logits.shape[1]), dim=-1)
        return torch.stack([values, ids.to(values.dtype)], dim=1)  # ids up to 2^24 are exact in float32

    opinions = runtime.scored(memories, [prompt for *_, prompt in held], opinion)
    return [
        Conversation(manner, question, prompt.reply, pair[:, 1].long(), pair[:, 0])
        for (manner, question, prompt), pair in zip(held, opinions, strict=True)
    ]


def _texts(base: BaseModel, replies: Sequence[list[int]]) -> list[str]:
    """The first line of every reply."""
    lines = [base.tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0] for ids in replies]
    return [line.strip() or "What does the text say?" for line in lines]
