"""What a report is made of; Markdown and HTML are two ways to write the same blocks."""

from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Flags:
    """Warnings, each a subject and a reason."""

    rows: list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Cells of raw text, escaped by whoever writes them.

    Attributes:
        texts: how many columns on the left are text; the others are numbers, aligned right and never wrapped.
        best: (row, column) of the cells in bold.
        folded: a title under which the table is hidden at first, where the format can.
    """

    columns: list[str]
    rows: list[list[str]]
    texts: int = 1
    best: frozenset[tuple[int, int]] = frozenset()
    folded: str | None = None


@dataclass(frozen=True)
class Figure:
    """A drawn plot. `name` is its file name without ending; `task` the task that it belongs to."""

    name: str
    task: str
    caption: str
    png: bytes = field(repr=False)
    svg: bytes = field(repr=False)


Block: TypeAlias = Heading | Paragraph | Flags | Table | Figure
