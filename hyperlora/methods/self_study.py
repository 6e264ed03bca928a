"""Conversations about a document that the model holds with itself, to learn from (Eyuboglu et al. 2025, Cartridges).

The model reads the document, is asked to ask something about a sentence of it in one of five manners, and answers its
own question with the document in sight. What it would have said at every position, as the log-probabilities of its
likeliest tokens, is what a student without the document is trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, stable_seed
from hyperlora.methods.kv_cache import prefill
from hyperlora.methods.summary import sentences
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime

# By manner: what the model is asked to write about one sentence of the text, and the words that it goes on from. Small
# models that are told neither the sentence nor the first words write about anything but the text's details.
SEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "question": (
        "Write a short question that is answered by this sentence: {sentence}",
        ("Who", "What", "When", "Where", "How many", "Which", "Why", "How"),
    ),
    "structuring": (
        "Write a request to put what this sentence says in order: {sentence}",
        ("List", "Name", "Give the names and numbers of"),
    ),
    "use case": (
        "Write the question of somebody who needs to know this: {sentence}",
        ("Can you tell me", "I need to know", "What should I know about"),
    ),
    "summarisation": (
        "Write a request to sum up what the text says about this: {sentence}",
        ("What does the text say about", "Summarize"),
    ),
    "creative": (
        "Write a quiz question about this sentence: {sentence}",
        ("True or false:", "Complete the sentence:", "Explain to a child"),
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
    temperature: float = 0.6,
) -> list[Conversation]:
    """`conversations` about the document and one recitation of every chunk of it.

    Every other conversation is a plain question, the rest take the other manners in turn; sentences come in turn, or
    evenly spread where there are more sentences than conversations. The model sees one chunk of at most `chunk_tokens`.
    """
    runtime = Runtime(base, batch_tokens=16384)
    ids = document_ids(base.tokenizer, document.text)
    count = -(-len(ids) // chunk_tokens)
    bounds = [len(ids) * i // count for i in range(count + 1)]
    texts = [base.tokenizer.decode(ids[a:b]) for a, b in pairwise(bounds)]
    memories = [Memory(kv=prefill(base, text)) for text in texts]
    pieces = [(chunk, piece.strip()) for chunk, text in enumerate(texts) for piece in sentences(text)]
    asked: list[tuple[str, str, int]] = []  # manner, first words of the question, chunk
    instructions, seeds = [], []
    plain, *others = SEEDS
    for number in range(conversations):
        manner = plain if number % 2 == 0 else others[number // 2 % len(others)]
        instruction, starts = SEEDS[manner]
        seeds.append(stable_seed(seed, document.id, number))
        start = starts[seeds[-1] % len(starts)]
        chunk, piece = pieces[int(number * max(1, len(pieces) / conversations)) % len(pieces)]
        prompt = runtime.question(chunk, instruction.format(sentence=piece))
        instructions.append(replace(prompt, ids=prompt.ids + document_ids(base.tokenizer, base.prompt.lead + start)))
        asked.append((manner, start, chunk))
    rests = _texts(base, runtime.generate_ids(memories, instructions, 24, temperature, seeds))
    questions = [f"{start} {rest}".strip() for (_, start, _), rest in zip(asked, rests, strict=True)]
    prompts = [runtime.question(chunk, q) for q, (*_, chunk) in zip(questions, asked, strict=True)]
    replies = runtime.replies(memories, prompts, reply_tokens)
    held = [
        (manner, question, Prompt(prompt.memory, prompt.ids, reply))
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
    """Every reply up to its first question mark or line break."""
    lines = [base.tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0] for ids in replies]
    return [line.split("?")[0].strip() + "?" * ("?" in line) for line in lines]
