import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hyperlora.errors import InputError
from hyperlora.evaluation.agreement import cohen_kappa, fleiss_kappa
from hyperlora.evaluation.comparison import Comparison, win_rate
from hyperlora.evaluation.human import export_sheets, read_results

METHODS = ("patch-7", "full-text")
COMPARISONS = [
    Comparison(
        f"q{i}", f"Line one of {i // 2},\nline two; of {i // 2}", f"Who is {i}?", ("Maro", "M."), f"x{i}", f"y{i}"
    )
    for i in range(20)
]


def export(folder: Path, comparisons: list[Comparison] = COMPARISONS, seed: int = 0) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    sheet, key = folder / "sheet.csv", folder / "key.json"
    export_sheets(comparisons, METHODS, [sheet], key, seed)
    return sheet, key


def rows_of(sheet: Path) -> list[dict[str, str]]:
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(sheet: Path, name: str, choose: Callable[[dict[str, str]], str], delimiter: str = ",") -> Path:
    """A copy of the sheet as a rater's spreadsheet would save it."""
    rows, target = rows_of(sheet), sheet.with_name(name)
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({**row, "choice": choose(row)} for row in rows)
    return target


def prefers(start: str) -> Callable[[dict[str, str]], str]:
    return lambda row: "A" if row["A"].startswith(start) else "B"


def number(row: dict[str, str]) -> int:
    return int(row["question"].split()[-1].rstrip("?"))


def test_the_sheet_is_blind_and_random_by_seed(tmp_path: Path) -> None:
    sheet, key = export(tmp_path / "one")
    again, _ = export(tmp_path / "two")
    other, _ = export(tmp_path / "three", seed=1)
    assert sheet.read_bytes() == again.read_bytes() and sheet.read_bytes().startswith(b"\xef\xbb\xbf")
    rows = rows_of(sheet)
    assert sorted(map(number, rows)) == list(range(20)) and list(map(number, rows)) != list(range(20))
    assert list(map(number, rows)) != list(map(number, rows_of(other)))
    assert not any(method in sheet.read_text() for method in METHODS) and "q1" not in sheet.read_text()
    assert 4 <= sum(row["A"].startswith("x") for row in rows) <= 16
    secret = json.loads(key.read_text())
    for row in rows:
        entry = secret["rows"][row["id"]]
        assert entry["comparison"] == f"q{number(row)}" and row["id"][0] == "r"
        assert entry["A"] == METHODS[row["A"].startswith("y")]
        assert {row["A"], row["B"]} == {f"x{number(row)}", f"y{number(row)}"} and row["answers"] == "Maro\nM."


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    nasty = Comparison("1", "=1+1", "@SUM(A1)", ("+1",), "-2", "=HYPERLINK(1)\nmore")
    row = rows_of(export(tmp_path, [nasty])[0])[0]
    assert (row["document"], row["question"], row["answers"]) == ("'=1+1", "'@SUM(A1)", "'+1")
    assert {row["A"], row["B"]} == {"'-2", "'=HYPERLINK(1)\nmore"}
    plain = Comparison("1", "'quoted'", "a=b", ("3-2",), "x", "y")
    row = rows_of(export(tmp_path / "plain", [plain])[0])[0]
    assert (row["document"], row["question"], row["answers"]) == ("'quoted'", "a=b", "3-2")


def test_results_undo_the_order(tmp_path: Path) -> None:
    sheet, key = export(tmp_path)
    first = read_results([fill(sheet, "1.csv", prefers("x"))], key)
    assert first["methods"] == list(METHODS) and first["win_rate"] == (1.0, 1.0, 1.0) and first["agreement"] is None
    assert (first["wins"], first["losses"], first["ties"]) == (20, 0, 0)
    assert read_results([fill(sheet, "2.csv", prefers("y"))], key)["win_rate"][0] == 0.0

    def mixed(row: dict[str, str]) -> str:  # 12 wins, 4 losses, 4 ties, as people write
        if number(row) < 4:
            return " TIE"
        return prefers("x" if number(row) < 16 else "y")(row).lower()

    found = read_results([fill(sheet, "3.csv", mixed, ";")], key)
    assert (found["wins"], found["losses"], found["ties"]) == (12, 4, 4)
    assert found["documents"] == 10 and found["comparisons"] == 20 and found["raters"] == 1
    mean, low, high = found["win_rate"]
    assert mean == pytest.approx(0.7) and low < 0.7 < high


def test_raters_are_averaged_and_their_agreement_measured(tmp_path: Path) -> None:
    sheet, key = export(tmp_path)
    one = fill(sheet, "1.csv", lambda row: prefers("x" if number(row) < 10 else "y")(row))
    two = fill(sheet, "2.csv", lambda row: prefers("x" if number(row) < 15 else "y")(row))
    three = fill(sheet, "3.csv", lambda row: prefers("x")(row))
    both = read_results([one, two], key)
    # Agreement 15/20; chance 0.5 * 0.75 + 0.5 * 0.25 = 0.5, over the methods and not over the letters.
    assert both["agreement"] == {"statistic": "Cohen's kappa", "kappa": pytest.approx(0.5)}
    assert both["win_rate"][0] == pytest.approx((10 + 15) / 40) and (both["wins"], both["losses"]) == (25, 15)
    # Ten rows of three equal ratings, ten of two; 45 of 60 ratings for the first method.
    every = read_results([one, two, three], key)["agreement"]
    chance = 0.75**2 + 0.25**2
    assert every == {"statistic": "Fleiss' kappa", "kappa": pytest.approx((2 / 3 - chance) / (1 - chance))}


def test_the_interval_is_over_documents() -> None:
    together = win_rate(["a"] * 10 + ["b"] * 10, [1.0] * 10 + [0.0] * 10)
    apart = win_rate([str(i) for i in range(20)], [1.0] * 10 + [0.0] * 10)
    assert together == (0.5, 0.0, 1.0) and apart[1] > 0.2
    assert win_rate(["a", "a", "b"], [1.0, 0.0, 1.0])[0] == 0.75


def test_faulty_sheets_are_named_by_line_and_column(tmp_path: Path) -> None:
    sheet, key = export(tmp_path)
    good = fill(sheet, "good.csv", prefers("x")).read_text()
    third = rows_of(sheet)[2]["id"]
    line = 1 + next(i for i, text in enumerate(good.split("\n")) if text.startswith(third))
    assert line == 1 + 2 * 3 + 1  # documents and answers have two lines each
    bad = tmp_path / "bad.csv"

    def refused(text: str, message: str) -> None:
        bad.write_text(text)
        with pytest.raises(InputError) as caught:
            read_results([bad], key)
        assert message in str(caught.value) and "bad.csv" in str(caught.value) and "\n" not in str(caught.value)

    records = [f"{row['id']},{'maybe' if i == 2 else 'A'}" for i, row in enumerate(rows_of(sheet))]
    refused("id,choice\n" + "\n".join(records), f"line 4, column choice: 'maybe' of row {third}; write A, B or tie")
    refused(good.replace(",A,", ",,").replace(",B,", ",,"), "line 2, column choice: ''")
    refused(good.replace(third, "r000"), f"line {line}, column id: 'r000' is not in")
    refused(good.replace(third, rows_of(sheet)[0]["id"]), f"line {line}, column id: ")
    refused(good.replace("choice", "Choices"), "line 1: no column 'choice'")
    refused("id,choice\n" + "\n".join(records[:2]), "lacks 18 rows")
    refused(good + '"', "unexpected end of data")
    refused("id,choice\nr000", "column id: 'r000'")
    with pytest.raises(InputError, match="every one once"):
        read_results([tmp_path / "good.csv", tmp_path / "good.csv"], key)
    with pytest.raises(InputError, match="not the key of a sheet"):
        read_results([tmp_path / "good.csv"], tmp_path / "good.csv")
    with pytest.raises(InputError, match="cannot read"):
        read_results([tmp_path / "none.csv"], key)


def test_empty_rows_and_long_cells_do_no_harm(tmp_path: Path) -> None:
    long = [Comparison("1", "word " * 60_000, "Who?", ("M",), "x", "y")]
    sheet, key = export(tmp_path, long)
    filled = tmp_path / "1.csv"
    filled.write_text(sheet.read_text().replace('"",""', '"tie",""') + ",,,,,,,\n\n")
    assert read_results([filled], key)["ties"] == 1


def test_export_refuses_what_would_lose_or_mix_work(tmp_path: Path) -> None:
    export(tmp_path)
    with pytest.raises(InputError, match="already exists"):
        export(tmp_path)
    with pytest.raises(InputError, match="both methods are called"):
        export_sheets(COMPARISONS, ("a", "a"), [tmp_path / "s.csv"], tmp_path / "k.json")
    with pytest.raises(InputError, match="ids must be unique"):
        export_sheets(COMPARISONS[:1] * 2, METHODS, [tmp_path / "s.csv"], tmp_path / "k.json")
    with pytest.raises(InputError, match="no comparisons"):
        export_sheets([], METHODS, [tmp_path / "s.csv"], tmp_path / "k.json")


def test_kappas_of_the_textbook() -> None:
    # Two readers of 50 proposals: both yes 20, both no 15, only the first yes 5, only the second 10.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    # Fourteen raters, ten subjects, five categories: kappa 0.210.
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    subjects = [[category for category, n in enumerate(row) for _ in range(n)] for row in counts]
    assert fleiss_kappa(list(zip(*subjects, strict=True))) == pytest.approx(0.2099, abs=5e-5)


def test_kappas_at_their_ends() -> None:
    assert cohen_kappa("aabb", "aabb") == 1.0 and cohen_kappa("aabb", "bbaa") == -1.0
    assert fleiss_kappa(["aabb"] * 3) == 1.0
    assert cohen_kappa("aaa", "aaa") is None and fleiss_kappa(["aaa"] * 3) is None
