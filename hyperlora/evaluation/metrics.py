"""Scores of a text against accepted ones, in plain functions: exact match, token F1, containment, ROUGE-L.

Sources: Rajpurkar et al. 2016 (arXiv 1606.05250), evaluation script v1.1, re-implemented; ROUGE-L of Lin 2004 (ACL
W04-1013).
"""

import re
import string
from collections import Counter
from collections.abc import Iterable

from hyperlora.errors import InputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def _largest(scores: Iterable[float]) -> float:
    found = list(scores)
    if not found:
        raise InputError("a text has no answer to be scored against; give one or more for each prediction")
    return max(found)


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 when the normalised prediction equals an answer."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Largest token F1 over the answers, 0 to 1. Raises InputError when there is no answer."""
    return _largest(_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers)


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def contains(prediction: str, answers: Iterable[str]) -> float:
    """1.0 when an answer stands in the prediction as whole words."""
    text = f" {normalise(prediction)} "
    return float(any(f" {normalise(answer)} " in text for answer in answers))


def rouge_l(prediction: str, answers: Iterable[str]) -> float:
    """Largest ROUGE-L F-measure over the answers, 0 to 1: balanced, over lower-case words, without stemming.

    Raises:
        InputError: there is no answer.
    """
    return _largest(_rouge_l(_words(prediction), _words(answer)) for answer in answers)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = [0] * (len(answer) + 1)  # longest common subsequence of the prediction so far and of answer[:i]
    for word in prediction:
        above = common[:]
        for i, other in enumerate(answer):
            common[i + 1] = above[i] + 1 if word == other else max(above[i + 1], common[i])
    return 2 * common[-1] / (len(prediction) + len(answer))


METRICS = {"f1": f1, "exact_match": exact_match, "contains": contains}
TEXT_METRICS = {**METRICS, "rouge_l": rouge_l}  # and what suits longer texts than answers


def lower_is_better(metric: str) -> bool:
    """Of likelihoods, in nats per token: of the accepted answer, of the teacher's reply, of a reply to its readers."""
    return "nll" in metric.split("_")
