"""From a results dictionary to the blocks of its report."""

from collections.abc import Iterator, Sequence
from typing import Any

from hyperlora.report.blocks import Block, Figure, Flags, Heading, Paragraph, Table
from hyperlora.report.costs import cost_table
from hyperlora.report.units import (
    MISSING,
    amount,
    curve_points,
    finite,
    interval,
    lower_is_better,
    metric_label,
    number,
    one_line,
    ordered,
    settings,
    tag_value,
)

_EXAMPLES = 3  # per task
_LONGEST_TEXT = 300
Row = dict[str, Any]


def report_blocks(results: dict[str, Any], figures: Sequence[Figure]) -> Iterator[Block]:
    """The whole report, in reading order."""
    yield Heading(1, results["name"])
    yield _flags(results)
    yield _header(results)
    for task in results["tasks"]:
        yield from _task(results, task, figures)
    if elsewhere := [figure for figure in figures if figure.task not in results["tasks"]]:
        yield Heading(2, "Training")
        yield from elsewhere
    if results["methods"]:
        yield from _methods(results["methods"], results["costs"])
    if results["forgetting"]:
        yield Heading(2, "Forgetting")
        yield Paragraph(_forgetting(results["unrelated"]))
        rows = [[r["method"], r["measure"], interval(r), r["unit"], str(r["documents"])] for r in results["forgetting"]]
        yield Table(["method", "measure", "mean [95 % interval]", "unit", "documents"], rows, texts=2)
    if results["by_tag"] or results["curves"]:
        yield Heading(2, "Numbers behind the plots")
        yield from _by_tag(results)
        yield from _curves(results)


def _flags(results: dict[str, Any]) -> Flags:
    """One line for all metrics of a method that are flagged for the same reason."""
    metrics: dict[tuple[str, str, str], list[str]] = {}
    for row in results["flags"]:
        metrics.setdefault((row["task"], row["method"], row["reason"]), []).append(row["metric"])
    return Flags([(f"{task}, {method}: {', '.join(found)}", why) for (task, method, why), found in metrics.items()])


def _header(results: dict[str, Any]) -> Table:
    base = {key: value for key, value in results["base"].items() if key != "name"}
    rows = [
        ["base", results["base"]["name"]],
        *([key, settings(value) if isinstance(value, dict) else str(value)] for key, value in base.items()),
        ["command", results["command"]],
        ["version", results["version"]],
        ["machine", settings(results["machine"])],
        ["seeds", f"{_listed(results['seeds'])} for random methods whose row under Methods names no others"],
    ]
    return Table(["", ""], rows, texts=2)


def _task(results: dict[str, Any], task: str, figures: Sequence[Figure]) -> Iterator[Block]:
    about = results["tasks"][task]
    yield Heading(2, task)
    parts = [about["kind"], f"{about['documents']} documents", f"{about['questions']} questions"]
    yield Paragraph(", ".join([*parts, settings(about["settings"])]).rstrip(", "))
    scores, differences, gains = (
        [row for row in results[name] if row["task"] == task] for name in ("scores", "differences", "gains")
    )
    if scores:
        yield Paragraph(
            "Mean [95 % interval over documents]. own: the document's own memory; swapped: another document's memory."
        )
        yield _scores(scores, results, task)
    yield from (figure for figure in figures if figure.task == task)
    if differences:
        yield Heading(3, "Differences")
        yield Paragraph("Own score minus that of the other, paired by document.")
        yield _differences(differences, results, task)
    if gains:
        yield Heading(3, "Recovered gain")
        yield Paragraph(
            "Share of the worth of the whole document that the memory keeps: numerator / denominator. raw: (method - "
            "none) / (document in the prompt - none). adapted: (own - swapped memory) / (document in the prompt of the "
            "adapted model - another document there)."
        )
        yield _gains(gains, results, task)
    examples = [row for row in results["examples"] if row["task"] == task]
    if examples:
        yield Heading(3, "Examples")
        shown = examples[:_EXAMPLES]
        if len(shown) < len(examples):
            yield Paragraph(f"{len(shown)} of {len(examples)}; the others are in the results file.")
        yield from (_example(row) for row in shown)


def _metrics(rows: Sequence[Row], results: dict[str, Any], task: str) -> list[str]:
    return ordered((row["metric"] for row in rows), results["tasks"][task]["metrics"])


def _scores(rows: Sequence[Row], results: dict[str, Any], task: str) -> Table:
    metrics = _metrics(rows, results, task)
    cells = {(r["method"], r["metric"], r["condition"]): r for r in rows}
    methods = ordered((row["method"] for row in rows), results["methods"])
    columns = [f"{metric_label(metric)}, {condition}" for metric in metrics for condition in ("own", "swapped")]
    table = [[method, *[MISSING] * len(columns), _documents(rows, method)] for method in methods]
    most = max((row["documents"] for row in rows if row["condition"] == "own"), default=0)
    best = set()
    for place, metric in enumerate(metrics):
        shown: dict[int, float] = {}
        for line, method in enumerate(methods):
            for offset, condition in enumerate(("own", "swapped")):
                if row := cells.get((method, metric, condition)):
                    table[line][1 + 2 * place + offset] = interval(row)
                    # What ran on fewer documents may have had easier ones; what reads the same is equally good.
                    whole = condition == "own" and row["documents"] == most
                    if whole and (mean := finite(row["mean"])) is not None:
                        shown[line] = round(mean, 3)
        top = min(shown.values(), default=None) if lower_is_better(metric) else max(shown.values(), default=None)
        best |= {(line, 1 + 2 * place) for line, value in shown.items() if value == top}
    return Table(["method", *columns, "documents"], table, best=frozenset(best))


def _documents(rows: Sequence[Row], method: str) -> str:
    return ", ".join(str(n) for n in sorted({row["documents"] for row in rows if row["method"] == method}))


def _differences(rows: Sequence[Row], results: dict[str, Any], task: str) -> Table:
    metrics = _metrics(rows, results, task)
    cells = {(r["method"], r["against"], r["metric"]): interval(r) for r in rows}
    table = []
    for method in ordered((row["method"] for row in rows), results["methods"]):
        for other in ordered((r["against"] for r in rows if r["method"] == method), results["methods"]):
            table.append([method, other, *(cells.get((method, other, metric), MISSING) for metric in metrics)])
    return Table(["method", "minus", *map(metric_label, metrics)], table, texts=2)


def _gains(rows: Sequence[Row], results: dict[str, Any], task: str) -> Table:
    cells = {(r["method"], r["metric"], r["kind"]): _gain(r) for r in rows}
    table = []
    for method in ordered((row["method"] for row in rows), results["methods"]):
        own = [row for row in rows if row["method"] == method]
        for metric in _metrics(own, results, task):
            found = [cells.get((method, metric, kind), [MISSING, MISSING]) for kind in ("raw", "adapted")]
            table.append([method, metric, *found[0], *found[1]])
    quotient = "numerator / denominator"
    return Table(["method", "metric", "raw gain", quotient, "adapted gain", quotient], table, texts=2)


def _gain(row: Row) -> list[str]:
    weak = f"denominator {number(row['denominator'])}: too weak"
    gain = weak if row["weak"] else interval(row, "gain")
    return [gain, f"{number(row['numerator'])} / {number(row['denominator'])}"]


def _example(row: Row) -> Table:
    rows = [
        ["document", one_line(row["document"], _LONGEST_TEXT)],
        ["accepted", one_line("; ".join(row["accepted"]), _LONGEST_TEXT)],
        *([method, one_line(reply, _LONGEST_TEXT)] for method, reply in row["replies"].items()),
    ]
    return Table(["question", one_line(row["question"], _LONGEST_TEXT)], rows, texts=2)


def _methods(methods: dict[str, Row], measured: Row) -> Iterator[Block]:
    yield Heading(2, "Costs")
    yield Paragraph(
        "Bytes: medians over the documents that a method ran on, numbers at 16 bits; 1 KB is 1000 bytes. shared: held "
        "once for all documents. Ratio: bytes of the document's keys and values over resident bytes. Break-even: "
        "questions on one document from which on, or up to which, the method has cost less, in FLOP."
    )
    yield Paragraph(_measured(methods, measured))
    yield cost_table(methods)
    yield Heading(2, "Methods")
    yield Paragraph(
        "Seeds: those that a random method ran with, over which the scores of a document are averaged; nothing about "
        "the others is random."
    )
    rows = [
        [label, about["name"], settings(about["settings"]), _listed(about["seeds"]) or MISSING, about["summary"]]
        for label, about in methods.items()
    ]
    yield Table(["label", "method", "settings", "seeds", "summary"], rows, texts=5)


def _measured(methods: dict[str, Row], measured: Row) -> str:
    """How many documents operations, times and peaks of memory are the medians of, and which times are too long."""
    count = measured["documents"]
    if not count:
        return "Operations, times and peaks of memory were not measured."
    documents = "1 document" if count == 1 else f"{count} documents"
    text = f"Operations, times and peaks of memory: medians over {documents} of {measured['task']}, one at a time."
    if slow := [label for label, about in methods.items() if about["timing"].get("while_counted")]:
        text += f" Timed while their operations were counted, which slows a compilation: {'; '.join(slow)}."
    return text


def _forgetting(unrelated: Row | None) -> str:
    """What the measures of forgetting were taken on."""
    beside = (
        "With the document in the prompt: a task's questions, their own document in the prompt and the patch of "
        "another document on, minus the scores of full."
    )
    if unrelated is None:
        return beside
    return (
        f"Unrelated text: {unrelated['windows']} windows of up to {unrelated['tokens']} tokens of "
        f"{unrelated['source']}, one for each document, behind the prompt's prefix, where the document would stand. "
        f"Perplexity: of the mean loss over windows. {beside}"
    )


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _by_tag(results: dict[str, Any]) -> Iterator[Table]:
    for task, metric, tag in dict.fromkeys((r["task"], r["metric"], r["tag"]) for r in results["by_tag"]):
        rows = [r for r in results["by_tag"] if (r["task"], r["metric"], r["tag"]) == (task, metric, tag)]
        methods = ordered((row["method"] for row in rows), results["methods"])
        cells = {(tag_value(r["value"]), r["method"]): interval(r) for r in rows}
        table = []
        for value in dict.fromkeys(tag_value(row["value"]) for row in rows):
            counts = sorted({row["documents"] for row in rows if tag_value(row["value"]) == value})
            found = [cells.get((value, method), MISSING) for method in methods]
            table.append([value, *found, ", ".join(map(str, counts))])
        yield Table([tag, *methods, "documents"], table, folded=f"{task}: {metric_label(metric)} by {tag}")


def _curves(results: dict[str, Any]) -> Iterator[Table]:
    for task, metric, x in dict.fromkeys((r["task"], r["metric"], r["x"]) for r in results["curves"]):
        table = []
        for row in results["curves"]:
            if (row["task"], row["metric"], row["x"]) == (task, metric, x):
                for at, mean, low, high in curve_points(row, results["methods"]):
                    table.append([row["label"], amount(at), interval({"mean": mean, "low": low, "high": high})])
        yield Table(["curve", x, metric_label(metric)], table, folded=f"{task}: {metric_label(metric)} over {x}")
