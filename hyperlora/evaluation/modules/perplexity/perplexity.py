"""Perplexity of texts under a language model, over all their tokens, and the mean loss in nats per token."""

import math

from hyperlora.base_model import load_base
from hyperlora.evaluation.modules import metric
from hyperlora.evaluation.perplexity import perplexity, text_nll


def compute(predictions: list[str], base: str | None = None) -> dict[str, float]:
    """predictions: texts; base: what `hyperlora.load_base` takes."""
    value = perplexity(text_nll(load_base(base), predictions))
    return {"perplexity": value, "nll": math.log(value)}


Perplexity = metric("Perplexity", __doc__, compute, further=())
