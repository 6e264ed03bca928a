"""`hyperlora rate`: sheets exported from the folder of a comparison, filled in and imported."""

import json
from pathlib import Path

import pytest

from .conftest import Run, one_line
from .replies import LINES, write
from .test_human import fill, rows_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "run", LINES)


def right(row: dict[str, str]) -> str:
    return "A" if row["A"] == "Maro" else "b"


@pytest.fixture
def sheets(run: Run, folder: Path, tmp_path: Path) -> list[Path]:
    """Empty sheets of two raters."""
    code, out, err = run("rate", "export", folder, "patch", "full", "-o", tmp_path / "s.csv", "--raters", "2")
    assert code == 0, err
    assert out.splitlines()[:2] == [str(tmp_path / "s-1.csv"), str(tmp_path / "s-2.csv")]
    assert out.splitlines()[2].startswith(str(tmp_path / "s.key.json"))
    return [tmp_path / "s-1.csv", tmp_path / "s-2.csv"]


def test_sheets_are_blind_the_same_for_all_and_what_was_asked(sheets: list[Path]) -> None:
    one, two = (sheet.read_text(encoding="utf-8-sig") for sheet in sheets)
    assert one == two and not any(word in one for word in ("patch", "full", "doc-"))
    assert {row["question"] for row in rows_of(sheets[0])} == {each["question"] for each in LINES}
    assert {row["document"] for row in rows_of(sheets[0])} == {each["text"] for each in LINES}


def test_filled_sheets_give_win_rate_and_agreement(run: Run, sheets: list[Path]) -> None:
    fill(sheets[0], "s-1.csv", right)
    fill(sheets[1], "s-2.csv", lambda row: "tie" if row["question"] == "Who is 0.0?" else right(row))
    code, out, err = run("rate", "import", *sheets)
    assert code == 0, err
    # Who is 0.0 is asked by both tasks: two of nine rows, both won by the patch for the first rater.
    assert out.startswith("patch against full: win rate 0.667 [") and out.count("\n") == 1
    assert "on 6 documents; 10 wins, 6 losses, 2 ties; 2 raters, Cohen's kappa 0.6" in out
    found = json.loads(run("rate", "import", *sheets, "--json")[1])
    assert found["methods"] == ["patch", "full"] and (found["wins"], found["losses"], found["ties"]) == (10, 6, 2)
    # Agreement 7/9; chance (6*4 + 3*3 + 0*2) / 81.
    assert found["agreement"]["kappa"] == pytest.approx((7 / 9 - 33 / 81) / (1 - 33 / 81))
    code, out, err = run("rate", "import", sheets[0])
    assert code == 0 and "win rate 0.750" in out and out.endswith("; 1 rater\n"), err


def test_raters_who_always_choose_the_same_have_no_kappa(run: Run, sheets: list[Path]) -> None:
    for sheet in sheets:
        fill(sheet, sheet.name, lambda row: "tie")
    assert "Cohen's kappa undefined: all choices are the same" in run("rate", "import", *sheets)[1]


def test_the_key_of_a_sheet_is_found_or_given(run: Run, folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "round-2.csv"  # one rater: no number is added, none is taken away
    code, out, _ = run(
        "rate", "export", folder, "patch", "full", "-o", sheet, "--task", "squad", "--items", "3", "--json"
    )
    key = tmp_path / "round-2.key.json"
    assert code == 0 and json.loads(out) == {"sheets": [str(sheet)], "key": str(key), "comparisons": 3}
    fill(sheet, sheet.name, right, ";")
    assert "2 wins, 1 losses" in run("rate", "import", sheet)[1]
    moved = key.rename(tmp_path / "kept.json")
    code, out, err = run("rate", "import", sheet)
    assert code == 3 and not out and "--key" in one_line(err)
    assert "2 wins, 1 losses" in run("rate", "import", sheet, "--key", moved)[1]


def test_a_raters_work_is_not_overwritten(run: Run, folder: Path, sheets: list[Path]) -> None:
    fill(sheets[1], "s-2.csv", right)
    sheets[0].unlink()
    before = sheets[1].read_bytes()
    export = ("rate", "export", folder, "patch", "full", "-o", sheets[0].with_name("s.csv"), "--raters", "2")
    code, out, err = run(*export)
    assert code == 3 and not out and "s-2.csv already exists" in one_line(err) and "--force" in one_line(err)
    assert sheets[1].read_bytes() == before and not sheets[0].exists()
    assert run(*export, "--force")[0] == 0
    assert sheets[0].exists() and {row["choice"] for row in rows_of(sheets[1])} == {""}


def test_sheets_that_cannot_be_written_or_read(run: Run, folder: Path, sheets: list[Path], tmp_path: Path) -> None:
    code, _, err = run("rate", "export", folder, "patch", "full", "-o", tmp_path / "sheet.xlsx")
    assert code == 3 and "ends in .csv" in one_line(err)
    code, _, err = run("rate", "export", folder, "patch", "full", "-o", tmp_path / "none" / "sheet.csv")
    assert code == 3 and "no directory" in one_line(err)
    code, _, err = run("rate", "import", sheets[0])
    assert code == 3 and "s-1.csv, line 2, column choice" in one_line(err) and "write A, B or tie" in one_line(err)
    assert run("rate", "export", folder, "patch", "full", "-o", tmp_path / "x.csv", "--raters", "0")[0] == 2
