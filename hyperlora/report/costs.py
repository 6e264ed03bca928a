"""The table of what memories cost."""

from typing import Any

from hyperlora.report.blocks import Table
from hyperlora.report.units import MISSING, amount, byte_size, flops, milliseconds, seconds

_COLUMNS = [
    "method",
    "stored",
    "resident",
    "shared",
    "ratio",
    "compile operations",
    "first token operations",
    "compile time",
    "first token time",
    "time per further token",
    "peak memory, compiling",
    "peak memory, answering",
]


def cost_table(methods: dict[str, dict[str, Any]]) -> Table:
    """One row per method."""
    rivals = list(dict.fromkeys(rival for about in methods.values() for rival in about["break_even"]))
    rows = []
    for label, about in methods.items():
        timing = about["timing"]
        rows.append(
            [
                label,
                byte_size(about["stored_bytes"]),
                byte_size(about["resident_bytes"]),
                byte_size(about["shared_bytes"]),
                amount(about["effective_ratio"], "×"),
                flops(about["compile_flops"]),
                flops(about.get("query_flops")),
                seconds(timing.get("compile_seconds")),
                seconds(timing.get("first_token_seconds")),
                milliseconds(timing.get("token_milliseconds")),
                amount(timing.get("peak_mib"), " MiB"),
                amount(timing.get("answer_peak_mib"), " MiB"),
                *(_break_even(about, rival) for rival in rivals),
            ]
        )
    return Table([*_COLUMNS, *(f"break-even with {rival}" for rival in rivals)], rows)


def _break_even(about: dict[str, Any], rival: str) -> str:
    # Without counted operations nothing is known, not even that it never pays.
    if rival not in about["break_even"] or about["compile_flops"] is None:
        return MISSING
    if (found := about["break_even"][rival]) is None:
        return "never"
    first, last = found
    return amount(first, " questions") if last is None else f"up to {amount(last, ' questions')}"
