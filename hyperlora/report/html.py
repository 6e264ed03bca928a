"""The report as one HTML page that loads nothing from elsewhere."""

import base64
from collections.abc import Sequence
from html import escape as html_escape
from typing import Any

from hyperlora.report.blocks import Block, Figure, Flags, Heading, Paragraph, Table
from hyperlora.report.sections import report_blocks
from hyperlora.report.units import clean

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 14px; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; min-width: 5rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.number { white-space: normal; vertical-align: bottom; }
.flags { border: 2px solid #d55e00; background: #fff4ec; padding: .2rem 1.2rem; }
.flags h2 { margin-top: .6rem; border: 0; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption { color: #555; }
summary { cursor: pointer; }
"""
# The browser refuses whatever an oversight here might let through.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(results: dict[str, Any], figures: Sequence[Figure] = ()) -> str:
    """The report of a results dictionary, figures included."""
    body = "\n".join(_block(block) for block in report_blocks(results, figures))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(results['name'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Text that is nothing but text, between tags and in quoted attributes; braces too, for pages run as templates."""
    return html_escape(clean(text)).replace("{", "&#123;").replace("}", "&#125;")


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Flags([]):
            return "<p>No flags.</p>"
        case Flags(rows):
            lines = [f"<li><strong>{escape(subject)}</strong>: {escape(reason)}</li>" for subject, reason in rows]
            return f'<section class="flags"><h2>⚠ Flags ({len(rows)})</h2><ul>{"".join(lines)}</ul></section>'
        case Figure():
            # As an image, not as part of the page: nothing in an image's SVG can run or be confused with another's ids.
            data, caption = base64.b64encode(block.svg).decode(), escape(block.caption)
            image = f'<img src="data:image/svg+xml;base64,{data}" alt="{caption}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    head = "".join(f"<th{_kind(table, at)}>{escape(name)}</th>" for at, name in enumerate(table.columns))
    lines = []
    for line, row in enumerate(table.rows):
        cells = []
        for at, cell in enumerate(row):
            text = f"<strong>{escape(cell)}</strong>" if (line, at) in table.best else escape(cell)
            cells.append(f"<td{_kind(table, at)}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    inner = f"<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody>"
    html = f'<div class="wide"><table>{inner}</table></div>'
    return html if table.folded is None else f"<details><summary>{escape(table.folded)}</summary>{html}</details>"


def _kind(table: Table, column: int) -> str:
    return "" if column < table.texts else ' class="number"'
