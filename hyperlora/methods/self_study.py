"""Conversations that the model holds with itself, to learn from.

About a document (Eyuboglu et al. 2025, Cartridges, arXiv 2506.06266): the model reads two examples and the document,
goes on with questions about its sentences in one of five manners, and answers its own questions with the document alone
in sight. About anything (Xu et al. 2024, Magpie, arXiv 2406.08464): it goes on with the user's side of an empty chat.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hyperlora.base_model import BaseModel
from hyperlora.data.rows import FEW_WORDS
from hyperlora.errors import InputError
from hyperlora.memory import Memory
from hyperlora.methods.contract import Document, stable_seed
from hyperlora.methods.summary import sentences
from hyperlora.prompt import document_ids, whole
from hyperlora.runtime import Prompt, Runtime
from hyperlora.structure import context_window

# What the asking model reads before the document. A small model that is told to write a question writes about
# questions, and one that goes on with a bare page of exercises leaves the page; shown how, it asks what the page says.
EXAMPLES = """\
Text: The Wren Bridge in the town of Corby was built in 1873 by the engineer Clara Holt. It is 212 metres long and \
carries a railway line over the River Welland. Because iron was cheap in those years, its arches were made of iron \
instead of stone.

Sentence: The Wren Bridge in the town of Corby was built in 1873 by the engineer Clara Holt.
Question: In what year was the Wren Bridge built?
Question: Who built the bridge in Corby?
Question: What was Clara Holt's profession?

Sentence: Because iron was cheap in those years, its arches were made of iron instead of stone.
Question: What were the arches of the bridge made of?
Question: Why was iron used for the arches?

Text: Sleep is controlled by two processes. One is the body clock, which follows the light of the day; the other is \
the pressure to sleep, which grows with every hour that a person is awake. Coffee keeps people awake because \
caffeine blocks the substance adenosine, which builds up in the brain.

Sentence: Sleep is controlled by two processes.
Question: How many processes control sleep?

Sentence: Coffee keeps people awake because caffeine blocks the substance adenosine, which builds up in the brain.
Question: Which substance is blocked by caffeine?
Question: Where does adenosine build up?
Question: What keeps people awake?

Text: """
# By manner: how the question about a sentence starts, for the model to go on from.
SEEDS: dict[str, tuple[str, ...]] = {
    "question": (
        *("", "What", "What is", "What was", "What did", "What does", "What are", "What can", "What year"),
        *("What type of", "What kind of", "What is the name of", "What is another name for", "Which", "Which year"),
        *("Who", "Who was", "Who did", "When", "When did", "When was", "Where", "Where did", "Where was", "Why"),
        *("Why did", "How", "How many", "How much", "How long", "How did", "In what", "In which", "On what", "By what"),
        *("To what", "Along with", "According to", "Besides", "The"),
    ),
    "structuring": ("List the", "Name the", "What are the"),
    "use case": ("Can you tell me", "I want to know", "Is it true that"),
    "summarisation": ("Summarize what the text says about", "What does the text say about"),
    "creative": ("True or false:", "Explain to a child", "Complete the sentence:"),
}
COPIES = ("quotation", "recitation")  # manners whose replies are the document's own words
LENGTHS = ("", FEW_WORDS.strip(), "Answer in one sentence.", "Answer in detail.")
_OPENING, _QUESTION = 128, 24  # tokens at most of a sentence with the start of a question, and of the rest of it
_LEAST = 32  # tokens of document to a chunk
_QUOTED = 64  # tokens at most of a quoted sentence
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
    temperature: float = 1.0,
    min_p: float = 0.1,
) -> list[Conversation]:
    """At most `conversations` about the document, no question twice; one quotation to every five of them; and one
    recitation of every chunk of the document.

    A quotation is a sentence of the document as the reply to one of the questions: the model's own replies seldom come
    to the middle of its words. Seven in eight are plain questions, to be answered in a few words; the rest take the
    other manners in turn and any length of answer. Sentences come in turn, or evenly spread where there are more
    sentences than conversations. The model sees one chunk of at most `chunk_tokens`, less where its window is small.

    Raises:
        InputError: the document is empty, or the window too small for any of it.
    """
    if not document.text.strip():
        raise InputError(f"document {document.id} is empty; there is nothing to ask about")
    runtime = Runtime(base, batch_tokens=49152)
    ids = document_ids(base.tokenizer, document.text)
    around = len(document_ids(base.tokenizer, base.prompt.prefix + EXAMPLES)) + _OPENING + _QUESTION + 8
    window = context_window(base.model)
    if window < around + _LEAST:
        raise InputError(f"{base.name} has a window of {window} tokens; self-study needs {around + _LEAST} at least")
    count = -(-len(ids) // min(chunk_tokens, window - around))
    bounds = [len(ids) * i // count for i in range(count + 1)]
    texts = [whole(base.tokenizer, ids[a:b]) for a, b in pairwise(bounds)]
    contexts = [document_ids(base.tokenizer, text) for text in texts]
    pieces = [(chunk, piece.strip()) for chunk, text in enumerate(texts) for piece in sentences(text)]
    asked: dict[tuple[int, str], str] = {}  # manner by chunk and question
    openings, seeds, starts = [], [], []
    plain, *others = SEEDS
    for number in range(conversations):
        manner = others[number // 8 % len(others)] if number % 8 == 7 else plain
        seeds.append(stable_seed(seed, document.id, number))
        pick, which = divmod(seeds[-1], len(SEEDS[manner]))
        start = SEEDS[manner][which]
        chunk, piece = _spread(pieces, number, conversations)
        opening = f"Sentence: {piece}\nQuestion: {start}".rstrip()
        openings.append(Prompt(chunk, document_ids(base.tokenizer, opening)[-_OPENING:], []))
        length = LENGTHS[1] if manner == plain else LENGTHS[pick % len(LENGTHS)]
        starts.append((manner, start, length, chunk))
    told = [Memory(text=tuple(document_ids(base.tokenizer, EXAMPLES + text))) for text in texts]

    memories, last = runtime.prefill(told), _ending(base)
    found = runtime.generate_ids(memories, openings, _QUESTION, temperature, min_p, seeds, last=last)
    for (manner, start, length, chunk), rest in zip(starts, _texts(base, found), strict=True):
        if start or rest:
            asked.setdefault((chunk, f"{start} {rest} {length}".strip()), manner)
    memories = runtime.prefill([Memory(text=tuple(context)) for context in contexts])
    replies = runtime.replies(memories, [runtime.question(*question) for question in asked], reply_tokens)
    held = [
        Conversation(manner, contexts[chunk], question, reply)
        for ((chunk, question), manner), reply in zip(asked.items(), replies, strict=True)
        if reply
    ]
    rng = random.Random(stable_seed(seed, document.id))
    by_chunk = [[c.question for c in held if c.context == context] for context in contexts]
    for number in range(conversations // 5):
        chunk, piece = _spread(pieces, number, conversations // 5)
        if by_chunk[chunk]:
            reply = base.prompt.answer_ids(base.tokenizer, piece)[:_QUOTED]
            held.append(Conversation("quotation", contexts[chunk], rng.choice(by_chunk[chunk]), reply))
    for text, context in zip(texts, contexts, strict=True):
        asking = RECITE if count == 1 else f"{RECITE} Start with: {' '.join(text.split()[:6])}"
        held.append(Conversation("recitation", context, asking, base.prompt.answer_ids(base.tokenizer, text)))
    return held


def chat(
    base: BaseModel, seed: int, conversations: int, reply_tokens: int = 48, temperature: float = 1.0, min_p: float = 0.1
) -> list[Conversation]:
    """At most `conversations` about anything, without a document (`context` is empty). Every second question asks for a
    few words."""
    runtime, (_, *first) = Runtime(base), SEEDS["question"]  # without a text, something has to be there to go on from
    starts = [first[number % len(first)] for number in range(conversations)]
    openings = [Prompt(0, document_ids(base.tokenizer, start), []) for start in starts]
    seeds = [stable_seed(seed, "chat", number) for number in range(conversations)]
    found = runtime.generate_ids([Memory()], openings, _QUESTION, temperature, min_p, seeds, last=_ending(base))
    asked = [
        f"{start} {rest} {LENGTHS[number % 2]}".strip()
        for number, (start, rest) in enumerate(zip(starts, _texts(base, found), strict=True))
    ]
    prompts = [runtime.question(0, question) for question in asked]
    replies = runtime.generate_ids([Memory()], prompts, reply_tokens, temperature, min_p, seeds)
    return [Conversation("chat", [], question, reply) for question, reply in zip(asked, replies, strict=True) if reply]


def _spread(pieces: Sequence[tuple[int, str]], number: int, count: int) -> tuple[int, str]:
    """The piece for the `number`-th of `count`: all in turn, or evenly spread where there are more pieces than that."""
    return pieces[int(number * max(1, len(pieces) / count)) % len(pieces)]


def _ending(base: BaseModel) -> Callable[[int], bool]:
    """Whether a question ends with a token."""
    return lambda token: any(mark in base.tokenizer.decode([token]) for mark in "?\n")


def _texts(base: BaseModel, replies: Sequence[list[int]]) -> list[str]:
    """Every reply up to its first question mark or line break."""
    lines = [base.tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0] for ids in replies]
    return [line.split("?")[0].strip() + "?" * ("?" in line) for line in lines]
