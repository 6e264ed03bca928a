"""Two methods' replies to the same question, seen blind as A and B, and the win rate that the choices give."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperlora.errors import InputError
from hyperlora.evaluation.bootstrap import interval

CHOICES = {"a": "A", "b": "B", "tie": "tie"}  # as people and models write them, in lower case


@dataclass(frozen=True)
class Comparison:
    """One question with the replies of a first and a second method.

    Attributes:
        id: unique among the comparisons.
        document: the text that the question is about.
        answers: accepted answers.
    """

    id: str
    document: str
    question: str
    answers: tuple[str, ...]
    first: str
    second: str


def check(comparisons: Sequence[Comparison]) -> None:
    """Raises InputError when there is nothing to compare, or ids repeat."""
    if not comparisons:
        raise InputError("no comparisons; both methods need a reply to at least one question")
    seen: set[str] = set()
    for comparison in comparisons:
        if comparison.id in seen:
            raise InputError(f"two comparisons have the id {comparison.id!r}; ids must be unique")
        seen.add(comparison.id)


def first_is_a(comparison: Comparison, seed: int) -> bool:
    """Whether the first method's reply is shown as A: a fair coin that seed and id decide."""
    return random.Random(f"{seed}\0{comparison.id}").random() < 0.5


def first_wins(choice: str, first_is_a: bool) -> float:
    """What a choice (A, B or tie) is worth to the first method: 1, 0 or, for a tie, 1/2."""
    return 0.5 if choice == "tie" else float((choice == "A") == first_is_a)


def win_rate(documents: Sequence[str], values: Sequence[float]) -> tuple[float, float, float]:
    """The first method's win rate and its 95 % interval, from one value per comparison and the document of each.

    Questions on one document are not independent, so documents are what is averaged and resampled.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for document, value in zip(documents, values, strict=True):
        groups[document].append(value)
    return interval([sum(group) / len(group) for group in groups.values()])


def summary(result: Mapping[str, Any]) -> str:
    """One line for a result of a judge or of raters, as far as they have the same fields."""
    (first, second), (mean, low, high) = result["methods"], result["win_rate"]
    return (
        f"{first} against {second}: win rate {mean:.3f} [{low:.3f}, {high:.3f}] on {result['documents']} documents; "
        f"{result['wins']} wins, {result['losses']} losses, {result['ties']} ties"
    )
