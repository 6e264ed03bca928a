"""Blind A/B sheets for human raters: a CSV for each to fill in, a key kept apart, and what the filled sheets say."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperlora.errors import InputError
from hyperlora.evaluation.agreement import agreement
from hyperlora.evaluation.comparison import CHOICES, Comparison, check, first_is_a, first_wins, win_rate
from hyperlora.files import sha256, write_text
from hyperlora.reading import read_document

_COLUMNS = ("id", "document", "question", "answers", "A", "B", "choice", "comment")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # spreadsheets run cells that start so


def export_sheets(
    comparisons: Sequence[Comparison],
    methods: tuple[str, str],
    sheets: Sequence[Path],
    key: Path,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Write `sheets`, one for each rater and all the same, and `key`, which says who is who and stays with the
    experimenter.

    Rows, and the replies within them, stand in a random order that `seed` fixes; raters fill the column `choice` with
    A, B or tie. Spreadsheets show 32,767 characters of a cell: give longer documents to the raters separately.

    Raises:
        InputError: a file exists and `force` is not set, or the methods have the same name.
    """
    check(comparisons)
    if methods[0] == methods[1]:
        raise InputError(f"both methods are called {methods[0]!r}; give them different names")
    for path in (*sheets, key):
        if path.exists() and not force:
            raise InputError(f"{path} already exists and may hold a rater's work; choose another name or pass --force")
    # The hash orders the rows at random and ties the sheet to its key. The r keeps spreadsheets from seeing a number.
    rows = sorted((f"r{sha256(f'{seed}{vars(c)}'.encode())[:12]}", c) for c in comparisons)
    lines, secrets = io.StringIO(), {}
    writer = csv.writer(lines, quoting=csv.QUOTE_ALL)
    writer.writerow(_COLUMNS)
    for row, comparison in rows:
        straight = first_is_a(comparison, seed)
        a, b = (comparison.first, comparison.second) if straight else (comparison.second, comparison.first)
        answers = "\n".join(comparison.answers)
        cells = [row, comparison.document, comparison.question, answers, a, b, "", ""]
        writer.writerow(f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in cells)
        secrets[row] = {
            "comparison": comparison.id,
            "document": sha256(comparison.document.encode())[:12],
            "A": methods[0 if straight else 1],
        }
    try:
        for sheet in sheets:
            write_text(sheet, "\ufeff" + lines.getvalue())  # without the mark Excel does not read UTF-8
        write_text(key, json.dumps({"methods": methods, "seed": seed, "rows": secrets}, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the sheets and {key}: {error.strerror}") from error


def read_results(sheets: Sequence[Path], key: Path) -> dict[str, Any]:
    """What the raters of the filled sheets, one each, say about the key's methods.

    Returns:
        win_rate: of the first method, [mean, low, high]: ties count 1/2, raters are averaged, then documents.
        wins, losses, ties: of the first method, over all raters.
        agreement: None for one rater; else the statistic's name and kappa (None where it is undefined).

    Raises:
        InputError: a sheet is incomplete, or does not belong to the key; file, line and column are named.
    """
    try:
        secret = json.loads(read_document(key))
        (first, second), rows = secret["methods"], secret["rows"]
        straight = {row: entry["A"] == first for row, entry in rows.items()}
        documents = [entry["document"] for entry in rows.values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{key} is not the key of a sheet; give the file that was written with it") from error
    if not sheets or len({sheet.resolve() for sheet in sheets}) < len(sheets):
        raise InputError("give the filled sheet of each rater, every one once")
    choices = [_choices(sheet, set(rows), key) for sheet in sheets]
    ratings = [[first_wins(found[row], straight[row]) for row in rows] for found in choices]  # (raters, rows)
    everyone = [value for rating in ratings for value in rating]
    return {
        "methods": [first, second],
        "raters": len(sheets),
        "comparisons": len(rows),
        "documents": len(set(documents)),
        "win_rate": win_rate(documents, [sum(values) / len(sheets) for values in zip(*ratings, strict=True)]),
        "wins": everyone.count(1.0),
        "losses": everyone.count(0.0),
        "ties": everyone.count(0.5),
        "agreement": agreement(ratings) if len(sheets) > 1 else None,
    }


def _choices(sheet: Path, known: set[str], key: Path) -> dict[str, str]:
    """Choice (A, B or tie) by row of one filled sheet."""
    text = read_document(sheet)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # documents may be longer than the default allows
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # spreadsheets save with that of their country
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found: dict[str, str] = {}
    line = 1
    try:
        header = [name.strip() for name in next(reader)]
        for column in ("id", "choice"):
            if column not in header:
                raise InputError(f"{sheet}, line 1: no column {column!r}; keep the columns as exported")
        while True:
            line = reader.line_num + 1  # where the record starts: cells hold line breaks
            cells = next(reader)
            if not any(cell.strip() for cell in cells):
                continue
            record = dict(zip(header, cells, strict=False))
            row, choice = record["id"].strip(), record.get("choice", "").strip()
            if row not in known:
                raise InputError(f"{sheet}, line {line}, column id: {row!r} is not in {key}; give this sheet's key")
            if row in found:
                raise InputError(f"{sheet}, line {line}, column id: {row!r} stands there twice; remove one of them")
            if choice.lower() not in CHOICES:
                raise InputError(f"{sheet}, line {line}, column choice: {choice!r} of row {row}; write A, B or tie")
            found[row] = CHOICES[choice.lower()]
    except StopIteration:
        pass
    except csv.Error as error:
        raise InputError(f"{sheet}, line {line}: {error}; save the sheet as CSV") from error
    if missing := sorted(known - set(found)):
        raise InputError(f"{sheet} lacks {len(missing)} rows of the key, the first of them {missing[0]}; restore them")
    return found
