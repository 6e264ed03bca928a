import base64
import copy
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hyperlora.errors import InputError
from hyperlora.report import write_report
from hyperlora.report.html import page
from hyperlora.report.tables import escape, markdown
from hyperlora.report.units import byte_size, flops, interval, number, seconds

from .report_results import METRICS, make_results, poisoned, without_lists


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture(scope="module")
def written(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert all(path.is_file() for path in write_report(results, folder))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(source: str) -> None:
    for tag, attributes in Page(source).tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "svg")
        assert not any(name.startswith("on") or name in ("href", "style", "srcset") for name in attributes)
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:image/svg+xml;base64,")
    assert "@import" not in source and "url(" not in source


def test_all_numbers_are_in_both(results: dict[str, Any], written: Path) -> None:
    expected = {"1.23 TFLOP", "6.66 GFLOP", "56.7 ms", "34.5 ms", "1,234 MiB", "12.3 questions", "never", "9.44 MB"}
    expected |= {"21.9 MB", "148 s", "8×", "0.432 / 0.876", "denominator 0.012: too weak", "0.003 / 0.012", "0, 1"}
    expected |= {interval(r) for name in ("scores", "differences", "forgetting", "by_tag") for r in results[name]}
    expected |= {interval(r, "gain") for r in results["gains"] if not r["weak"]}
    for curve in results["curves"]:
        expected |= {interval(dict(zip(("mean", "low", "high"), point[1:], strict=True))) for point in curve["points"]}
    expected |= {"up to 4.56 questions", "medians over 3 documents of facts, one at a time", "4, 5"}
    expected |= {"which slows a compilation: context distillation.", "0, 1 for random methods whose row"}
    expected |= {"41 windows of up to 256 tokens of wikitext2_test", "behind the prompt's prefix"}
    expected |= {"40 documents", "77 questions", "39, 40", results["command"], "ab12cd", "swapped is not clearly worse"}
    in_markdown = re.sub(r"\\(.)", r"\1", (written / "results.md").read_text())
    for text in (in_markdown, Page((written / "report.html").read_text()).text):
        assert [value for value in sorted(expected) if value not in text] == []


def test_flags_come_first_and_one_line_serves_all_metrics(written: Path) -> None:
    for name in ("results.md", "report.html"):
        text = (written / name).read_text()
        assert text.count("books, summary: nll, f1") == 1
        assert text.index("Flags (1)") < text.index("SmolLM2-135M") < text.index("Recovered gain")


def test_best_own_score_is_bold(results: dict[str, Any], written: Path) -> None:
    bold = re.findall(r"\*\*([-0-9.]+) \[", (written / "results.md").read_text())
    own = [r for r in results["scores"] if r["condition"] == "own"]
    best = []
    for task, metrics in METRICS.items():
        for metric in metrics:
            means = [r["mean"] for r in own if (r["task"], r["metric"]) == (task, metric)]
            best.append(number(min(means) if metric == "nll" else max(means)))
    assert sorted(bold) == sorted(best)
    assert (written / "report.html").read_text().count("<strong>") == len(best) + 1  # and the flag


def test_fewer_documents_are_neither_best_nor_unmarked(results: dict[str, Any], tmp_path: Path) -> None:
    few = copy.deepcopy(results)
    for row in few["scores"]:
        if row["method"] == "context distillation":
            row |= {"documents": 10, "mean": 0.0 if row["metric"] == "nll" else 0.999}
    write_report(few, tmp_path)
    bold = re.findall(r"\*\*([-0-9.]+) \[", (tmp_path / "results.md").read_text())
    assert len(bold) == 4 and not {"0.000", "0.999"} & set(bold)
    drawn = (tmp_path / "plots" / "quality-bytes-facts.svg").read_text()
    assert "context distillation, 10 documents" in drawn and "generator, " not in drawn


def test_tables_are_whole(written: Path) -> None:
    blocks = (written / "results.md").read_text().split("\n\n")
    assert sum(block.startswith("| ") for block in blocks) > 15
    for block in blocks:
        if block.startswith("| "):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_page_loads_nothing(written: Path) -> None:
    source = (written / "report.html").read_text()
    assert_self_contained(source)
    images = [dict(attributes) for tag, attributes in Page(source).tags if tag == "img"]
    assert len(images) == len(list((written / "plots").glob("*.svg"))) == len(list((written / "plots").glob("*.png")))
    assert base64.b64decode((images[0]["src"] or "").split(",")[1]).startswith(b"<?xml")


def test_plots_are_those_of_the_numbers(written: Path) -> None:
    assert {path.stem for path in (written / "plots").iterdir()} == {
        "quality-bytes-facts",
        "quality-bytes-books",
        "quality-compile-time-facts",
        "quality-compile-time-books",
        "by-depth-length-exact-match-facts",
        "by-style-facts",
        "by-years-facts",
        "curve-exact-match-seconds-facts",
        "curve-exact-match-steps-facts",
    }
    timed, sized = ((written / f"plots/quality-{name}-books.svg").read_text() for name in ("compile-time", "bytes"))
    assert "self-study" in sized and "self-study" not in timed, "no timing, no mark"


def test_hostile_text_is_inert(results: dict[str, Any], tmp_path: Path) -> None:
    files = write_report(poisoned(json.loads(json.dumps(results))), tmp_path)
    assert all(re.fullmatch(r"[a-z0-9-]+\.(png|svg)", path.name) for path in files[2:])
    source = (tmp_path / "report.html").read_text()
    assert_self_contained(source)
    text = Page(source).text
    assert "<script>alert(1)</script> | {{ 7*7 }}" in text and "\x00" not in text and "{{" not in source
    markdown_text = (tmp_path / "results.md").read_text()
    assert not re.search(r"<|{{|(?<!\\)[`$]|\n# owned|\n\| a \| b", markdown_text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\{\\{ 7\\*7 \\}\\}" in markdown_text
    assert set(re.findall(r"\]\(([^)]*)\)", re.sub(r"\\.", "", markdown_text))) == {
        f"plots/{path.name}" for path in files[2:] if path.suffix == ".png"
    }
    for path in files[2:]:
        assert path.suffix == ".png" or "<script>" not in path.read_text()


def test_only_what_could_be_markup_is_escaped() -> None:
    assert escape("a_b [0.1, -2.0e-05] _c_ [d](e)") == "a_b [0.1, -2.0e-05] \\_c\\_ \\[d\\](e)"
    assert escape("a\\|b") == "a\\\\\\|b" and escape("two\nlines\r\n| x") == "two lines \\| x"


def test_same_results_give_the_same_files(results: dict[str, Any], written: Path, tmp_path: Path) -> None:
    for path in write_report(copy.deepcopy(results), tmp_path):
        assert path.read_bytes() == (written / path.relative_to(tmp_path)).read_bytes(), path.name


def test_report_is_written_whole_or_not_at_all(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = without_lists(results)
    write_report(small, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    real = Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if path.name == "report.html":
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InputError, match="No space left"):
        write_report(small | {"name": "another"}, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(tmp_path / "out")) == ["plots", "report.html", "results.md"]


def test_empty_lists_give_a_report(results: dict[str, Any], tmp_path: Path) -> None:
    files = write_report(without_lists(results), tmp_path / "new" / "folder")
    assert [path.name for path in files] == ["results.md", "report.html"]
    assert "No flags." in files[0].read_text() and "12.3 questions" in files[0].read_text()
    write_report(without_lists(results) | {"tasks": {}, "methods": {}}, tmp_path)


def test_missing_numbers_are_dashes(results: dict[str, Any], tmp_path: Path) -> None:
    nan, found = float("nan"), copy.deepcopy(results)
    for entry in found["scores"]:
        if entry["method"] == "generator":
            entry |= {"mean": nan, "low": None, "high": nan}
        elif entry["method"] == "none":
            entry |= {"low": None, "high": None}
    found["by_tag"] = [{**found["by_tag"][0], "mean": None, "low": None, "high": None}]
    found["curves"][0]["points"] = [["summary", nan, nan, nan], ["generator", 0.5, None, None]]
    found["curves"] = found["curves"][:1]
    about = found["methods"]["generator"]
    about |= {"timing": {}, "compile_flops": None, "resident_bytes": float("inf"), "effective_ratio": None}
    about["break_even"] = {"re-prefilling": None, "cached KV": None}
    text = write_report(found, tmp_path)[0].read_text()
    assert not re.search(r"\b(nan|inf|None)\b", text)
    costs = re.search(r"^\| generator \| 590 KB .*$", text, re.MULTILINE)
    assert costs is not None and costs[0].count("–") == 10 and "never" not in costs[0]
    scores = re.search(r"^\| generator \| –.*$", text, re.MULTILINE)
    assert scores is not None and scores[0].count("–") == 6


def test_what_was_not_measured_is_said(results: dict[str, Any]) -> None:
    found = copy.deepcopy(results) | {"unrelated": None}
    for count, said in ((0, "were not measured."), (1, "medians over 1 document of facts, one at a time.")):
        found["costs"] = found["costs"] | {"documents": count}
        text = Page(page(found)).text
        assert f"Operations, times and peaks of memory{':' if count else ''} {said}" in text
        assert "Unrelated text" not in text and "minus the scores of full" in text


def test_units() -> None:
    assert [byte_size(n) for n in (0, 999, 999.6, 21_879_664)] == ["0 B", "999 B", "1 KB", "21.9 MB"]
    assert [seconds(n) for n in (0.0123, 0.99996, 5000)] == ["12.3 ms", "1 s", "5,000 s"]
    assert flops(2.5e9) == "2.5 GFLOP" and flops(None) == "–"
    assert [number(n) for n in (0, -0.1234, 3e-5, float("nan"), None)] == ["0.000", "-0.123", "3.0e-05", "–", "–"]


def test_without_matplotlib_the_error_names_the_extra(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=re.escape('pip install "hyperlora[eval]"')):
        write_report(results, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "matched bytes" in markdown(results) and "matched bytes" in page(results)
