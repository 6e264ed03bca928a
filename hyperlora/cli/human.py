"""`hyperlora rate`: people compare the replies of two methods, on sheets that do not say whose they are."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hyperlora.cli import options
from hyperlora.errors import InputError

rate = typer.Typer(help="Blind sheets on which people compare two methods.", no_args_is_help=True)


@rate.command("export")
def export_sheets(
    folder: options.Compared,
    first: options.First,
    second: options.Second,
    output: Annotated[Path, typer.Option("--output", "-o", help="Sheet (.csv); NAME-1.csv ... for several raters.")],
    raters: Annotated[int, typer.Option(min=1, help="People who rate; each gets a sheet.")] = 1,
    task: options.TaskLabel = None,
    items: options.Items = None,
    seed: options.Seed = 0,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a sheet for each rater, to be filled in with A, B or tie, and a key, which is kept from the raters."""
    from hyperlora.evaluation import human
    from hyperlora.evaluation.replies import read_comparisons

    if output.suffix.lower() != ".csv":
        raise InputError(f"{output}: sheets are CSV; give a name that ends in .csv")
    if not output.parent.is_dir():
        raise InputError(f"no directory {output.parent} for the sheets; make it first")
    names = [output.stem] if raters == 1 else [f"{output.stem}-{number}" for number in range(1, raters + 1)]
    sheets = [output.with_name(name + output.suffix) for name in names]
    key = output.with_name(f"{output.stem}.key.json")
    comparisons = read_comparisons(folder, first, second, task, items)
    human.export_sheets(comparisons, (first, second), sheets, key, seed, force)
    if as_json:
        print(json.dumps({"sheets": list(map(str, sheets)), "key": str(key), "comparisons": len(comparisons)}))
        return
    for sheet in sheets:
        print(sheet)
    print(f"{key} (says which reply is whose; keep it from the raters)")


@rate.command("import")
def import_sheets(
    sheets: Annotated[list[Path], typer.Argument(help="The filled sheets, one of each rater.")],
    key: Annotated[Path | None, typer.Option(help="Key of the sheets; default: the one beside the first.")] = None,
    as_json: options.Json = False,
) -> None:
    """Read filled sheets: the win rate with its 95 % interval, and how far the raters agree beyond chance."""
    from hyperlora.evaluation.comparison import summary
    from hyperlora.evaluation.human import read_results

    result = read_results(sheets, key or _key_beside(sheets[0]))
    print(json.dumps(result) if as_json else f"{summary(result)}; {_raters(result)}")


def _key_beside(sheet: Path) -> Path:
    """The key that export wrote with `sheet`, be it the only one or one of several."""
    for name in (sheet.stem, re.sub(r"-\d+$", "", sheet.stem)):
        key = sheet.with_name(f"{name}.key.json")
        if key.exists():
            return key
    raise InputError(f"no {key.name} beside {sheet}; give the key that was written with the sheets as --key")


def _raters(result: dict[str, Any]) -> str:
    agreement = result["agreement"]
    if agreement is None:
        return "1 rater"
    kappa = "undefined: all choices are the same" if agreement["kappa"] is None else f"{agreement['kappa']:.3f}"
    return f"{result['raters']} raters, {agreement['statistic']} {kappa}"
