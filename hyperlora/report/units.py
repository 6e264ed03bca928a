"""Numbers and foreign text for readers: units, intervals, missing values, which metrics there are."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hyperlora.evaluation.metrics import lower_is_better

MISSING = "–"
# One that is not here is shown without a unit.
_UNITS = {"f1": "0–1", "exact_match": "0–1", "contains": "0–1", "rouge_l": "0–1", "bert_score": "cosine"}
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def finite(value: Any) -> float | None:
    """The value as a float; None where it is missing, infinite or not a number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def number(value: Any) -> str:
    """Three decimals; very small values in scientific notation, so that they do not read as zero."""
    found = finite(value)
    if found is None:
        return MISSING
    return f"{found:.1e}" if 0 < abs(found) < 0.0005 else f"{found:.3f}"


def interval(row: Mapping[str, Any], middle: str = "mean") -> str:
    """`middle [low, high]` of a row of results."""
    low, high = finite(row["low"]), finite(row["high"])
    text = number(row[middle])
    return text if text == MISSING or low is None or high is None else f"{text} [{number(low)}, {number(high)}]"


def _scaled(value: Any, units: Sequence[str]) -> str:
    """Three significant digits in the largest of `units`, each 1000 times the one before, that leaves at least 1."""
    found = finite(value)
    if found is None:
        return MISSING
    scaled, index = found, 0
    while abs(float(f"{scaled:.3g}")) >= 1000 and index < len(units) - 1:
        scaled, index = scaled / 1000, index + 1
    return f"{_three(scaled)} {units[index]}"


def _three(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def byte_size(value: Any) -> str:
    """Decimal units: 1 KB is 1000 bytes."""
    return _scaled(value, ("B", "KB", "MB", "GB", "TB"))


def flops(value: Any) -> str:
    return _scaled(value, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def milliseconds(value: Any) -> str:
    return _scaled(value, ("ms", "s"))


def seconds(value: Any) -> str:
    found = finite(value)
    return MISSING if found is None else milliseconds(1000 * found)


def amount(value: Any, suffix: str = "") -> str:
    """Three significant digits and a suffix."""
    found = finite(value)
    return MISSING if found is None else _three(found) + suffix


def tag_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def is_share(metric: str) -> bool:
    """Whether the metric runs from 0 to 1."""
    return _UNITS.get(metric) == "0–1"


def metric_label(metric: str) -> str:
    """Name, unit and the direction that is better."""
    unit = _UNITS.get(metric, "nats per token" if lower_is_better(metric) else None)
    unit = f" ({unit})" if unit else ""
    return f"{metric}{unit} {'↓' if lower_is_better(metric) else '↑'}"


def ordered(found: Iterable[str], known: Iterable[str]) -> list[str]:
    """`found` without repetitions, in the order of `known`; what is not there comes last."""
    ranks = {name: rank for rank, name in enumerate(known)}
    return sorted(dict.fromkeys(found), key=lambda name: ranks.get(name, len(ranks)))


def curve_points(curve: Mapping[str, Any], methods: Mapping[str, Any]) -> list[list[Any]]:
    """The [at, mean, low, high] of a curve; over seconds, `at` names the method whose compile time is meant."""
    if curve["x"] != "seconds":
        return list(curve["points"])
    return [[methods[at]["timing"].get("compile_seconds"), *point] for at, *point in curve["points"]]


def settings(found: Mapping[str, Any]) -> str:
    """`key=value, ...`; nested values as JSON."""
    return ", ".join(f"{k}={v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}" for k, v in found.items())


def clean(text: str) -> str:
    """Text without control characters, changes of writing direction and half characters."""
    return _UNPRINTABLE.sub("\ufffd", text)


def one_line(text: str, limit: int | None = None) -> str:
    """Clean text on one line, cut to `limit` characters."""
    line = " ".join(clean(text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1].rstrip() + "…"
