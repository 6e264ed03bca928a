"""Plots of quality by tags of documents, such as depth and length of a needle."""

from collections.abc import Iterator, Sequence
from typing import Any

from hyperlora.report.style import Drawing, bars, legend, looks, panels, share_axis, short
from hyperlora.report.units import finite, is_share, metric_label, ordered, tag_value

# Joins two tags, and their values, in rows about both: tag "depth×length", value "0.5×1024".
BOTH = "×"
_MOST_CELLS_WITH_NUMBERS = 48
_NAMES = {"length": "length (tokens)", "depth": "depth (0 start, 1 end)"}
Row = dict[str, Any]


def tag_drawings(results: dict[str, Any]) -> Iterator[Drawing]:
    """A heat map where rows are about two tags at once; lines for the tags that no heat map shows."""
    for task in results["tasks"]:
        rows = [r for r in results["by_tag"] if r["task"] == task and finite(r["mean"]) is not None]
        metrics = ordered((row["metric"] for row in rows), results["tasks"][task]["metrics"])
        tags = list(dict.fromkeys(row["tag"] for row in rows))
        pairs = [tag for tag in tags if len(tag.split(BOTH)) == 2]
        mapped = {name for pair in pairs for name in pair.split(BOTH)}
        for pair in pairs:
            for metric in metrics:
                found = [row for row in rows if row["tag"] == pair and row["metric"] == metric]
                if found:
                    yield _heat_map(task, pair, metric, found, results)
        for tag in tags:
            if tag not in pairs and tag not in mapped:
                found = [row for row in rows if row["tag"] == tag]
                shown = [metric for metric in metrics if any(row["metric"] == metric for row in found)]
                yield _lines(task, tag, shown, found, results)


def _heat_map(task: str, pair: str, metric: str, rows: Sequence[Row], results: dict[str, Any]) -> Drawing:
    down, across = pair.split(BOTH)
    methods = ordered((row["method"] for row in rows), results["methods"])
    cells = {(row["method"], *row["value"].split(BOTH)): row["mean"] for row in rows}
    spans = {(row["method"], *row["value"].split(BOTH)): bars(row) for row in rows}
    ys, xs = (_sorted({key[place] for key in cells}) for place in (1, 2))
    low, high = (0.0, 1.0) if is_share(metric) else (min(cells.values()), max(cells.values()))
    figure, axes = panels(len(methods), 1.1 + 0.6 * len(xs), 0.9 + 0.42 * len(ys), columns=3, share=True)
    for panel, method in zip(axes, methods, strict=True):
        values = [[cells.get((method, y, x), float("nan")) for x in xs] for y in ys]
        mesh = panel.pcolormesh(values, cmap="cividis", vmin=low, vmax=high, edgecolors="white", linewidth=1)
        panel.set(title=short(method))
        _ticks(panel, [i + 0.5 for i in range(len(xs))], xs)
        panel.set_yticks([i + 0.5 for i in range(len(ys))], [short(y, 20) for y in ys])
        panel.grid(False)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelbottom=True, labelleft=True)
        if len(xs) * len(ys) <= _MOST_CELLS_WITH_NUMBERS:
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    dark = high > low and (value - low) / (high - low) < 0.55
                    colour = "black" if value != value or not dark else "white"
                    text = "–"
                    if value == value:
                        below, above = spans[method, ys[y], xs[x]]
                        text = f"{value:.2f}\n{value - below:.2f}–{value + above:.2f}"
                    panel.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=6, color=colour)
    axes[0].invert_yaxis()  # shared by all panels; the start of the document is on top
    figure.supxlabel(short(_NAMES.get(across, across)), fontsize=9)
    figure.supylabel(short(_NAMES.get(down, down)), fontsize=9)
    figure.colorbar(mesh, ax=axes, label=short(metric_label(metric)), shrink=0.9)
    caption = f"{task}: {metric_label(metric)} by {down} and {across}, means with 95 % intervals"
    return Drawing(f"by-{pair}-{metric}", task, caption, figure)


def _lines(task: str, tag: str, metrics: Sequence[str], rows: Sequence[Row], results: dict[str, Any]) -> Drawing:
    methods = ordered((row["method"] for row in rows), results["methods"])
    values = _sorted({tag_value(row["value"]) for row in rows})
    style = looks(results)
    handles: dict[str, Any] = {}
    figure, axes = panels(len(metrics), 3.6, 3.0, columns=2)
    for panel, metric in zip(axes, metrics, strict=True):
        highest = 0.0
        for place, method in enumerate(methods):
            found = [row for row in rows if row["method"] == method and row["metric"] == metric]
            found.sort(key=lambda row: values.index(tag_value(row["value"])))
            if not found:
                continue
            # Side by side, so that the bars of methods that do equally well do not cover each other.
            shift = 0.4 * (place / max(1, len(methods) - 1) - 0.5)
            x = [values.index(tag_value(row["value"])) + shift for row in found]
            below, above = zip(*map(bars, found), strict=True)
            means = [row["mean"] for row in found]
            colour, marker = style.get(method, ("black", "o"))
            drawn = panel.errorbar(x, means, (below, above), color=colour, marker=marker, ms=4.5, lw=1, elinewidth=0.8)
            handles[method] = drawn
            highest = max(highest, *(mean + rise for mean, rise in zip(means, above, strict=True)))
        _ticks(panel, range(len(values)), values)
        panel.set(xlabel=short(_NAMES.get(tag, tag)), ylabel=short(metric_label(metric)))
        panel.grid(False, axis="x")
        if is_share(metric):
            share_axis(panel, highest)
    legend(figure, handles)
    return Drawing(f"by-{tag}", task, f"{task}: quality by {tag}, means with 95 % intervals", figure)


def _ticks(panel: Any, places: Sequence[float], values: Sequence[str]) -> None:
    """Values under an x axis, slanted where they would run into each other."""
    labels = [short(value, 20) for value in values]
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, labels)) > 30 else {}
    panel.set_xticks(places, labels, **slant)


def _sorted(values: set[str]) -> list[str]:
    """By size where all are numbers, else by name."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)
