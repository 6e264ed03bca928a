"""ROUGE-L F-measure (Lin 2004), the largest over the references: 0 to 1, mean over predictions."""

from statistics import fmean

from hyperlora.evaluation.metrics import rouge_l
from hyperlora.evaluation.modules import metric


def compute(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """predictions: texts; references: for each, the accepted texts."""
    pairs = zip(predictions, references, strict=True)
    return {"rouge_l": fmean(rouge_l(text, answers) for text, answers in pairs)}


RougeL = metric("RougeL", __doc__, compute)
