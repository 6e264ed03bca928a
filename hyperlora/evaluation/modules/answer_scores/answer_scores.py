"""Token F1, exact match and containment of answers, as in SQuAD: 0 to 1, means over predictions."""

from statistics import fmean

from hyperlora.evaluation.metrics import METRICS
from hyperlora.evaluation.modules import metric


def compute(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """predictions: replies; references: for each, the accepted answers."""
    pairs = list(zip(predictions, references, strict=True))
    return {name: fmean(score(text, answers) for text, answers in pairs) for name, score in METRICS.items()}


AnswerScores = metric("AnswerScores", __doc__, compute)
