"""The report in Markdown."""

import re
from collections.abc import Sequence
from typing import Any

from hyperlora.report.blocks import Block, Figure, Flags, Heading, Paragraph, Table
from hyperlora.report.sections import report_blocks
from hyperlora.report.units import one_line

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# An underscore between letters or digits is no markup, nor are the brackets of an interval; both are too common to mar.
_SPECIAL = re.compile(r"([\\`*{}\[\]|~$#]|(?<![^\W_])_|_(?![^\W_]))")
_INTERVAL = re.compile(r"\\\[([-+.,e\d ]+)\\\](?!\()")


def markdown(results: dict[str, Any], figures: Sequence[Figure] = ()) -> str:
    """The report of a results dictionary; figures are linked as `plots/NAME.png`."""
    return "\n\n".join(_block(block) for block in report_blocks(results, figures)) + "\n"


def escape(text: str) -> str:
    """Text on one line that no Markdown renderer takes for markup, a table's border or a template."""
    line = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], one_line(text))
    return _INTERVAL.sub(r"[\1]", _SPECIAL.sub(r"\\\1", line))


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {escape(text)}"
        case Paragraph(text):
            return escape(text)
        case Flags([]):
            return "No flags."
        case Flags(rows):
            lines = [f"- **{escape(subject)}**: {escape(reason)}" for subject, reason in rows]
            return "\n".join([f"## ⚠ Flags ({len(rows)})", "", *lines])
        case Figure():
            return f"![{escape(block.caption)}](plots/{block.name}.png)"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    rules = ["---" if column < table.texts else "---:" for column in range(len(table.columns))]
    lines = [_row([escape(name) for name in table.columns]), f"|{'|'.join(rules)}|"]
    for line, row in enumerate(table.rows):
        cells = [escape(cell) for cell in row]
        lines.append(_row([f"**{cell}**" if (line, at) in table.best else cell for at, cell in enumerate(cells)]))
    title = [f"### {escape(table.folded)}", ""] if table.folded is not None else []
    return "\n".join([*title, *lines])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
