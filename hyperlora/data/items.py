"""The unit of training and evaluation: a document and what can be asked of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

_LONGEST_WORD = 64  # bytes


def is_text(text: str) -> bool:
    """Whether this is more than a word, also in languages without spaces."""
    return len(text.split()) > 1 or len(text.strip().encode()) > _LONGEST_WORD


@dataclass(frozen=True)
class Question:
    """A question, the reply to train on, and every reply that counts as right."""

    text: str
    reply: str
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A document with its questions. `following` is text that comes after it, when it was cut from a longer one; `tags`
    are what results can be grouped by, such as its length in tokens.
    """

    id: str
    text: str
    questions: tuple[Question, ...] = ()
    following: str = field(default="", repr=False)
    tags: Mapping[str, float | str] = field(default_factory=dict)
