"""Learning curves of training runs: exact match with the patch over steps and seconds, mean and range over seeds.

    python eval/learning_curves.py runs/one_fact -o eval/results/one_fact

The folder holds runs named FAMILY-SEED (`hyperlora train ... -o runs/one_fact/FAMILY-SEED`). Writes curves.json (every
point), curves.md (steps and seconds to the thresholds, final scores with the swapped control) and curves.png.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from hyperlora.errors import HyperloraError, InputError
from hyperlora.files import write_text

THRESHOLDS = (0.5, 0.9)
Curve = list[dict[str, float]]


def read(run: Path) -> Curve:
    """The evaluations of a run: step, seconds of training up to it, exact match with the patch and the swapped one."""
    seconds, curve, names = 0.0, [], set()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds += record.get("seconds", 0.0)
        if "evaluation" in record:
            names.add(record["evaluation"])
            scores = {key: record[f"{key}_exact_match"] for key in ("patch", "swapped")}
            curve.append({"step": record["step"], "seconds": seconds, **scores})
    if len(names) > 1:
        raise InputError(f"{run} evaluates {', '.join(sorted(names))}; a curve is of one of them")
    if not curve:
        raise InputError(f"{run} has no evaluations; its recipe needs the key 'evaluation'")
    return curve


def families(folder: Path) -> dict[str, dict[int, Curve]]:
    """Curves by family and seed."""
    found: dict[str, dict[int, Curve]] = {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        family, _, seed = path.parent.name.rpartition("-")
        if not family or not seed.isdigit():
            raise InputError(f"{path.parent} is not named FAMILY-SEED")
        found.setdefault(family, {})[int(seed)] = read(path.parent)
    if not found:
        raise InputError(f"no training runs in {folder}; make some with train/one_fact/run.sh")
    return found


def reached(curve: Curve, threshold: float, what: str) -> float | None:
    """Steps or seconds at the first evaluation from which on the exact match is `threshold` or more."""
    start = max((number + 1 for number, point in enumerate(curve) if point["patch"] < threshold), default=0)
    return curve[start][what] if start < len(curve) else None


def table(found: dict[str, dict[int, Curve]]) -> str:
    columns = [f"{what} to {threshold:g}" for threshold in THRESHOLDS for what in ("steps", "seconds")]
    lines = ["| family | seed | " + " | ".join([*columns, "last: patch", "swapped"]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 4))
    for family, seeds in found.items():
        for seed, curve in sorted(seeds.items()):
            cells = [reached(curve, t, what) for t in THRESHOLDS for what in ("step", "seconds")]
            shown = ["not reached" if cell is None else f"{cell:.0f}" for cell in cells]
            ends = [f"{curve[-1][key]:.3f}" for key in ("patch", "swapped")]
            lines.append("| " + " | ".join([family, str(seed), *shown, *ends]) + " |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[int, Curve]], path: Path) -> None:
    """Mean over seeds with the range between the worst and the best, over steps and over seconds."""
    from matplotlib import style

    from hyperlora.report.style import METADATA, RC, legend, look, panels, share_axis

    with style.context(["default", RC]):
        figure, axes = panels(2, 4.0, 3.0, 2)
        handles: dict[str, Any] = {}
        for index, (family, seeds) in enumerate(found.items()):
            colour, marker = look(index)
            shortest = min(map(len, seeds.values()))
            rows = list(zip(*(curve[:shortest] for curve in seeds.values()), strict=True))
            scores = [[point["patch"] for point in row] for row in rows]
            for ax, what in zip(axes, ("step", "seconds"), strict=True):
                x = [statistics.mean(point[what] for point in row) for row in rows]
                (handles[family],) = ax.plot(x, list(map(statistics.mean, scores)), color=colour, marker=marker, ms=3)
                ax.fill_between(x, list(map(min, scores)), list(map(max, scores)), color=colour, alpha=0.15, lw=0)
        for ax, label in zip(axes, ("optimizer steps", "training time (s)"), strict=True):
            ax.set_xlabel(label)
            ax.set_ylabel("exact match, new documents")
            share_axis(ax, 1.0)
        legend(figure, handles)
        figure.savefig(path, metadata=METADATA["png"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    try:
        found = families(options.runs)
    except HyperloraError as error:
        parser.exit(error.code, f"learning_curves: error: {error}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    write_text(options.output / "curves.json", json.dumps(found, indent=1) + "\n")
    write_text(options.output / "curves.md", table(found))
    draw(found, options.output / "curves.png")
    print(table(found), end="")


if __name__ == "__main__":
    main()
