"""How plots look: colours, markers, axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperlora.report.units import finite, one_line

# Okabe and Ito (2008) without the yellow, which vanishes on white; 7 and 11 have no common factor: 77 methods differ.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
RC = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "errorbar.capsize": 2.0,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "legend.frameon": False,
    "text.parse_math": False,  # names are not formulas
    "svg.hashsalt": "hyperlora",
    "savefig.dpi": 150,
}
# Nothing that differs from one run to the next.
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}


@dataclass(frozen=True)
class Drawing:
    """A matplotlib figure; `kind` and `task` say what it shows."""

    kind: str
    task: str
    caption: str
    figure: Any


def looks(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and marker per method, the same in all plots; curves with labels of their own come after the methods."""
    names = dict.fromkeys([*results["methods"], *(row["label"] for row in results["curves"])])
    return {name: look(index) for index, name in enumerate(names)}


def look(index: int) -> tuple[str, str]:
    """Colour and marker of method number `index`."""
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]


def panels(count: int, width: float, height: float, columns: int, share: bool = False) -> tuple[Any, list[Any]]:
    """A figure and its `count` axes, row by row; `width` and `height` in inches, of one panel."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """A legend of names beside the panels, in room that is added for it."""
    # A zero-width space in front, because matplotlib leaves out names that begin with an underscore.
    names = [f"\u200b{short(name)}" if name.startswith("_") else short(name) for name in handles]
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 0.6 + 0.075 * max(map(len, names)), max(height, 0.3 + 0.19 * len(names)))
    figure.legend(list(handles.values()), names, loc="outside right upper", handlelength=1.8)


def short(name: str, limit: int = 40) -> str:
    """A name that fits in a plot."""
    return one_line(name, limit)


def bars(row: Mapping[str, Any]) -> tuple[float, float]:
    """Length of the error bar below and above the mean; 0 where there is no interval."""
    mean, low, high = (finite(row[name]) for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return 0.0, 0.0
    return max(0.0, mean - low), max(0.0, high - mean)


def log_axis(axes: Any, values: Sequence[float], show: Callable[[float], str]) -> None:
    """A logarithmic x axis around `values`, its ticks written by `show`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    room = max((high / low) ** 0.08, 1.6)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 20 else (1.0,), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def share_axis(axes: Any, highest: float) -> None:
    """A y axis of a metric from 0 to 1, up to the `highest` value in the plot."""
    top = min(1.04, 1.08 * max(highest, 0.1))
    axes.set_ylim(-0.04 * top, top)


def apart(values: Sequence[float]) -> list[float]:
    """Values on a log axis, those that coincide moved apart just enough to tell their error bars from one another."""
    step = (max(values) / min(values) * 2.5) ** 0.012 if values else 1.0
    groups: list[list[int]] = []
    for index in sorted(range(len(values)), key=lambda i: (values[i], i)):
        if groups and values[index] < values[groups[-1][0]] * step:
            groups[-1].append(index)
        else:
            groups.append([index])
    moved = list(values)
    for group in groups:
        for place, index in enumerate(group):
            moved[index] *= step ** (place - (len(group) - 1) / 2)
    return moved
