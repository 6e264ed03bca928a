"""Conversations about a document that the model holds with itself, to learn from (Eyuboglu et al. 2025, Cartridges).

The model reads the document, goes on writing the user's side of the chat, where it asks something about a sentence in
one of five manners, and answers its own question with the document in sight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, stable_seed
from hyperlora.methods.summary import sentences
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime

# By manner: what stands after the sentence, for the model to go on from; the question starts behind the colon.
# A small model that is told to write a question writes about questions; one that goes on with a page of exercises asks.
SEEDS: dict[str, tuple[str, ...]] = {
    "question": tuple(
        f"Question: {start}"
        for start in (
            "Who",
            "What",
            "When",
            "Where",
            "How many",
            "Which",
            "Why",
            "How",
            "In what",
            "What is the name of",
        )
    ),
    "structuring": ("Exercise: List the", "Exercise: Name the", "Exercise: Give the"),
    "use case": tuple(
        f"Question of a reader: {start}" for start in ("Can you tell me", "I want to know", "Is it true")
    ),
    "summarisation": ("Exercise: Summarize what the text says about", "Question: What does the text say about"),
    "creative": ("Quiz: True or false:", "Exercise: Explain to a child", "Exercise: Complete the sentence:"),
}
LENGTHS = ("", "Answer in a few words.", "Answer in one sentence.", "Answer in detail.")
RECITE = "Repeat the text word for word."


@dataclass(frozen=True)
class Conversation:
    """A question about a text (`context`, token ids) and the reply (token ids) given with it in the prompt."""

    manner: str
    context: list[int]
    question: str
    reply: list[int]


def study(
    base: BaseModel,
    document: Document,
    seed: int,
    conversations: int,
    reply_tokens: int = 48,
    chunk_tokens: int = 512,
    temperature: float = 0.6,
) -> list[Conversation]:
    """`conversations` about the document and one recitation of every chunk of it.

    Every other conversation is a plain question, the rest take the other manners in turn; sentences come in turn, or
    evenly spread where there are more sentences than conversations. Three in four questions say how long the answer
    should be. The model sees one chunk of at most `chunk_tokens`.

    Raises:
        InputError: the document is empty.
    """
    if not document.text.strip():
        raise InputError(f"document {document.id} is empty; there is nothing to ask about")
    runtime = Runtime(base, batch_tokens=16384)
    ids = document_ids(base.tokenizer, document.text)
    count = -(-len(ids) // chunk_tokens)
    bounds = [len(ids) * i // count for i in range(count + 1)]
    texts = [base.tokenizer.decode(ids[a:b]) for a, b in pairwise(bounds)]
    contexts = [document_ids(base.tokenizer, text) for text in texts]
    memories = runtime.prefill([Memory(text=tuple(context)) for context in contexts])
    pieces = [(chunk, piece.strip()) for chunk, text in enumerate(texts) for piece in sentences(text)]
    asked: list[tuple[str, str, str, int]] = []  # manner, start of the question, length of the answer, chunk
    openings, seeds = [], []
    plain, *others = SEEDS
    for number in range(conversations):
        manner = plain if number % 2 == 0 else others[number // 2 % len(others)]
        seeds.append(stable_seed(seed, document.id, number))
        which, length = divmod(seeds[-1], len(LENGTHS))
        opening = SEEDS[manner][which % len(SEEDS[manner])]
        chunk, piece = pieces[int(number * max(1, len(pieces) / conversations)) % len(pieces)]
        openings.append(Prompt(chunk, document_ids(base.tokenizer, f"{piece}\n\n{opening}"), []))
        asked.append((manner, opening.partition(": ")[2], LENGTHS[length], chunk))
    rests = _texts(base, runtime.generate_ids(memories, openings, 24, temperature, seeds))
    questions = [f"{start} {rest} {length}".strip() for (_, start, length, _), rest in zip(asked, rests, strict=True)]
    prompts = [runtime.question(chunk, q) for q, (*_, chunk) in zip(questions, asked, strict=True)]
    replies = runtime.replies(memories, prompts, reply_tokens)
    held = [
        Conversation(manner, contexts[chunk], question, reply)
        for (manner, *_, chunk), question, reply in zip(asked, questions, replies, strict=True)
        if reply
    ]
    for text, context in zip(texts, contexts, strict=True):
        asking = RECITE if count == 1 else f"{RECITE} Start with: {' '.join(text.split()[:6])}"
        held.append(Conversation("recitation", context, asking, base.prompt.answer_ids(base.tokenizer, text)))
    return held


def _texts(base: BaseModel, replies: Sequence[list[int]]) -> list[str]:
    """Every reply up to its first question mark or line break."""
    lines = [base.tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0] for ids in replies]
    return [line.split("?")[0].strip() + "?" * ("?" in line) for line in lines]
