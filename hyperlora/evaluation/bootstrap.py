"""Paired bootstrap intervals over documents (Efron and Tibshirani 1993, percentile method)."""

from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean of per-document values and its 95 % interval. Pass differences for a paired comparison."""
    data = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), (0.025, 0.975))
    return float(data.mean()), float(low), float(high)
