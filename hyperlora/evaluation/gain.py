"""Recovered gain: what share of the document's worth a memory keeps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 2000


def recovered_gain(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """mean(numerators) / mean(denominators) over documents, with a 95 % bootstrap interval of the ratio.

    Raw gain: numerators (method - none), denominators (full - none). Adapted gain: (own - swapped memory) over (adapted
    model with the document - with another document). Where the denominator's own interval reaches zero or less than a
    tenth of its mean, it is too weak to divide by: gain, low and high are None and `weak` is True.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(top), size=(_RESAMPLES, len(top)))
    bottoms = bottom[picks].mean(axis=1)
    mean = float(bottom.mean())
    low, high = np.quantile(bottoms, (0.025, 0.975))
    weak = mean == 0 or min(low / mean, high / mean) < 0.1
    result: dict[str, Any] = {"numerator": float(top.mean()), "denominator": mean, "weak": bool(weak)}
    if weak:
        return {**result, "gain": None, "low": None, "high": None}
    some = bottoms / mean > 0  # few documents may be drawn so that there is nothing to divide by
    low, high = np.quantile(top[picks].mean(axis=1)[some] / bottoms[some], (0.025, 0.975))
    return {**result, "gain": float(top.mean()) / mean, "low": float(low), "high": float(high)}
