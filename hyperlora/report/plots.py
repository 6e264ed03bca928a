"""The report's plots, drawn with matplotlib (extra `eval`) without a display."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hyperlora.errors import InputError
from hyperlora.report.blocks import Figure
from hyperlora.report.style import (
    METADATA,
    RC,
    Drawing,
    apart,
    bars,
    legend,
    log_axis,
    looks,
    panels,
    share_axis,
    short,
)
from hyperlora.report.tags import tag_drawings
from hyperlora.report.units import byte_size, curve_points, finite, is_share, metric_label, ordered, seconds

Row = dict[str, Any]


@dataclass(frozen=True)
class _Cost:
    """What a method costs: an x axis."""

    name: str
    label: str
    value: Callable[[Row], Any]
    show: Callable[[float], str]


_COSTS = (
    _Cost("bytes", "resident bytes per document", lambda about: about["resident_bytes"], byte_size),
    _Cost("compile-time", "compile time per document", lambda about: about["timing"].get("compile_seconds"), seconds),
)
_CURVE_AXES = {"seconds": "time (s)", "steps": "steps"}


def check_plots() -> None:
    """Raises InputError when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError('plots need the extra: pip install "hyperlora[eval]"') from error


def render(results: dict[str, Any]) -> list[Figure]:
    """All plots for which there are numbers.

    Raises:
        InputError: matplotlib is not installed.
    """
    check_plots()
    from matplotlib import style

    figures: list[Figure] = []
    taken: set[str] = set()
    with style.context(["default", RC]):
        for drawing in _drawings(results):
            name = _file_name(f"{drawing.kind}-{drawing.task}", taken)
            png, svg = _saved(drawing.figure, "png"), _saved(drawing.figure, "svg")
            figures.append(Figure(name, drawing.task, drawing.caption, png, svg))
    return figures


def _saved(figure: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=METADATA[kind])
    return buffer.getvalue()


def _file_name(text: str, taken: set[str]) -> str:
    """A name of letters, digits and dashes that is not in `taken`, and then is."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80]
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


def _drawings(results: dict[str, Any]) -> Iterator[Drawing]:
    for cost in _COSTS:
        for task in results["tasks"]:
            yield from _quality(task, cost, results)
    yield from tag_drawings(results)
    for task, metric, x in dict.fromkeys((row["task"], row["metric"], row["x"]) for row in results["curves"]):
        rows = [r for r in results["curves"] if (r["task"], r["metric"], r["x"]) == (task, metric, x)]
        yield from _curves(task, metric, x, rows, results)


def _quality(task: str, cost: _Cost, results: dict[str, Any]) -> Iterator[Drawing]:
    """Own scores against a cost, a panel per metric."""
    known = {method: finite(cost.value(about)) for method, about in results["methods"].items()}
    prices = {method: price for method, price in known.items() if price is not None}
    rows = [
        row
        for row in results["scores"]
        if row["task"] == task and row["condition"] == "own"
        if finite(row["mean"]) is not None and row["method"] in prices
    ]
    costly = [prices[row["method"]] for row in rows if prices[row["method"]] > 0]
    if not costly:
        return
    metrics = ordered((row["metric"] for row in rows), results["tasks"][task]["metrics"])
    style = looks(results)
    most = max(row["documents"] for row in rows)

    def name(row: Row) -> str:
        """What ran on fewer documents says so."""
        return row["method"] if row["documents"] == most else f"{row['method']}, {row['documents']} documents"

    handles: dict[str, Any] = {}
    figure, axes = panels(len(metrics), 3.6, 3.0, columns=2)
    for panel, metric in zip(axes, metrics, strict=True):
        found = [row for row in rows if row["metric"] == metric]
        found.sort(key=lambda row: list(prices).index(row["method"]))
        free = [row for row in found if prices[row["method"]] == 0]
        paid = [row for row in found if row not in free]
        x = apart([prices[row["method"]] for row in paid])
        for row in free:  # zero has no place on a log axis
            colour, _ = style[row["method"]]
            line = panel.axhline(row["mean"], color=colour, lw=1.2, ls="--")
            below, above = bars(row)
            panel.axhspan(row["mean"] - below, row["mean"] + above, color=colour, alpha=0.12, lw=0)
            handles[f"{name(row)} ({cost.show(0)})"] = line
        for row, place in zip(paid, x, strict=True):
            colour, marker = style[row["method"]]
            below, above = bars(row)
            drawn = panel.errorbar(
                [place], [row["mean"]], [[below], [above]], color=colour, marker=marker, ms=5, ls="", elinewidth=1
            )
            handles[name(row)] = drawn
        log_axis(panel, costly, cost.show)
        panel.set(xlabel=cost.label, ylabel=short(metric_label(metric)))
        if is_share(metric):
            share_axis(panel, max(row["mean"] + bars(row)[1] for row in found))
    legend(figure, handles)
    caption = (
        f"{task}: quality against {cost.label}, means with 95 % intervals; marks at the same place are moved apart"
    )
    yield Drawing(f"quality-{cost.name}", task, caption, figure)


def _curves(task: str, metric: str, x: str, rows: Sequence[Row], results: dict[str, Any]) -> Iterator[Drawing]:
    style = looks(results)
    handles: dict[str, Any] = {}
    figure, (panel,) = panels(1, 4.6, 3.2, columns=1)
    highest = 0.0
    places: list[float] = []
    for row in rows:
        points = [
            p for p in curve_points(row, results["methods"]) if finite(p[0]) is not None and finite(p[1]) is not None
        ]
        if not points:
            continue
        spans = [bars({"mean": mean, "low": low, "high": high}) for _, mean, low, high in points]
        at, means = [p[0] for p in points], [p[1] for p in points]
        colour, marker = style[row["label"]]
        lows = [mean - below for mean, (below, _) in zip(means, spans, strict=True)]
        highs = [mean + above for mean, (_, above) in zip(means, spans, strict=True)]
        panel.fill_between(at, lows, highs, color=colour, alpha=0.15, lw=0)
        (handles[row["label"]],) = panel.plot(at, means, color=colour, marker=marker, ms=4, lw=1.3)
        highest, places = max(highest, *highs), [*places, *at]
    if not places:
        return
    if min(places) > 0 and max(places) / min(places) >= 100:
        log_axis(panel, places, lambda value: f"{value:g}")
    panel.set(xlabel=_CURVE_AXES[x], ylabel=short(metric_label(metric)))
    if is_share(metric):
        share_axis(panel, highest)
    legend(figure, handles)
    yield Drawing(f"curve-{metric}-{x}", task, f"{task}: {metric_label(metric)} over {x}, 95 % bands", figure)
