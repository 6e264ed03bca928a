"""BERTScore (Zhang et al. 2020), the reference with the largest F1: -1 to 1, means over predictions."""

from statistics import fmean

from hyperlora.evaluation.bert_score import bert_score, load_encoder
from hyperlora.evaluation.modules import metric


def compute(predictions: list[str], references: list[list[str]], encoder: str | None = None) -> dict[str, float]:
    """predictions: texts; references: for each, the accepted texts; encoder: a directory or hub id."""
    scores = bert_score(predictions, references, load_encoder(encoder))
    return {name: fmean(getattr(score, name) for score in scores) for name in ("precision", "recall", "f1")}


BertScore = metric("BertScore", __doc__, compute)
