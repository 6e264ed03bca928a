"""The report of a comparison: results.md, report.html, and the plots."""

import os
import tempfile
from pathlib import Path
from typing import Any

from hyperlora.errors import InputError
from hyperlora.report.html import page
from hyperlora.report.plots import check_plots, render
from hyperlora.report.tables import markdown

__all__ = ["check_plots", "write_report"]


def write_report(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the report of a results dictionary and return its files; the same results give the same bytes.

    Nothing in `folder` is replaced before all of the report has been written beside it. Plots of an earlier report that
    this one does not have stay where they are.

    Raises:
        InputError: matplotlib is not installed, or the disk cannot be written.
    """
    figures = render(results)
    # What UTF-8 cannot hold has been taken out with the control characters.
    files = {"results.md": markdown(results, figures).encode(), "report.html": page(results, figures).encode()}
    for figure in figures:
        files |= {f"plots/{figure.name}.png": figure.png, f"plots/{figure.name}.svg": figure.svg}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as name:
            partial = Path(name)
            for root in (partial, folder):
                (root / "plots").mkdir(exist_ok=True)
            for path, data in files.items():
                (partial / path).write_bytes(data)
            for path in files:
                os.replace(partial / path, folder / path)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    return [folder / path for path in files]
