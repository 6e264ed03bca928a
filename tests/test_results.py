"""From records to results, on records made by hand: what a comparison says can be worked out on paper."""

from typing import Any

import pytest

from hyperlora.base_model import BaseModel
from hyperlora.compare.experiment import Experiment
from hyperlora.compare.results import collect
from hyperlora.compare.units import Record, Unit
from hyperlora.data.items import Item, Question
from hyperlora.methods import METHODS

# F1 on two documents of 100 tokens and two of 200: own memory, swapped memory.
F1S: dict[str, tuple[list[float], list[float]]] = {
    "none": ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    "full": ([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    "patch": ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    "parrot": ([1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]),
    "distilled": ([0.0, 1.0], [0.0, 0.0]),
    "distilled, slow": ([1.0, 1.0], [0.0, 0.0]),
    "adapted full": ([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]),
}


@pytest.fixture
def found(base: BaseModel, tmp_path: Any) -> dict[str, Any]:
    return collected(base, tmp_path)


def collected(base: BaseModel, tmp_path: Any, **costs: dict[str, Any]) -> dict[str, Any]:
    """With these costs of methods, by label."""
    (tmp_path / "data.jsonl").write_text("")
    experiment = Experiment.model_validate(
        {
            "name": "by hand",
            "tasks": {"notes": {"task": "jsonl", "path": str(tmp_path / "data.jsonl")}},
            "methods": {
                "none": {"method": "none"},
                "full": {"method": "full"},
                "patch": {"method": "generator"},
                "parrot": {"method": "summary", "match": "patch"},
                "distilled": {"method": "distillation", "items": 2},
                "distilled, slow": {"method": "distillation", "items": 2},
                "adapted full": {"method": "adapted_full"},
            },
            "adapted": "adapted full",
        }
    )
    items = [
        Item(
            str(n), "Text.", (Question("What?", "yes", ("yes",)),), tags={"length": 100 if n < 2 else 200, "kind": "a"}
        )
        for n in range(4)
    ]
    finished = []
    for method, (own, swapped) in F1S.items():
        records = [_record(str(n), one, other) for n, (one, other) in enumerate(zip(own, swapped, strict=True))]
        if method == "patch":
            for record, beside in zip(records, (1.0, 0.0, 1.0, 0.0), strict=True):
                record["beside"] = _answers(beside)
                record["unrelated"] = {"bare": 3.0, "patched": 3.5 if record["document"] == "0" else 3.1}
        finished.append((Unit("notes", method, 0, tuple(items[: len(own)]), 0), records))
    costs = {label: {"compile_flops": None, "query_flops": None, "timing": {}} for label in experiment.methods} | costs
    return collect(experiment, experiment.read_tasks(), {"notes": items}, finished, [], costs, base, "x")


def _answers(f1: float) -> Record:
    return {"replies": ["yes" if f1 else "no"], "nll": [2.0 - f1], "teacher_nll": [2.0 - f1]}


def _record(document: str, own: float, swapped: float) -> Record:
    sizes = {"tokens": 100, "resident_bytes": 10, "stored_bytes": 10, "shared_bytes": 0}
    return {"document": document, **sizes, "own": _answers(own), "swapped": _answers(swapped)}


def test_gains(found: dict[str, Any]) -> None:
    gains = {(g["method"], g["kind"], g["metric"]): g for g in found["gains"]}
    # (2/4 - 0) / (3/4 - 0), and (2/4 - 0) / (4/4 - 1/4)
    for kind in ("raw", "adapted"):
        patch = gains["patch", kind, "f1"]
        assert (patch["numerator"], patch["denominator"], patch["gain"]) == pytest.approx((0.5, 0.75, 2 / 3))
    assert 0 <= gains["patch", "raw", "f1"]["low"] < 2 / 3 < gains["patch", "raw", "f1"]["high"]
    # Losses fall as scores rise.
    assert gains["patch", "adapted", "nll"]["gain"] == pytest.approx(2 / 3)
    assert gains["parrot", "adapted", "f1"]["numerator"] == 0
    # On the two documents that it ran on: (1/2 - 0) / (2/2 - 1/2).
    assert gains["distilled", "adapted", "f1"]["denominator"] == pytest.approx(0.5)
    assert ("adapted full", "adapted", "f1") not in gains


def test_a_method_that_another_documents_memory_serves_as_well_is_flagged(found: dict[str, Any]) -> None:
    flagged = {flag["method"] for flag in found["flags"] if flag["metric"] == "f1"}
    assert "parrot" in flagged and not {"none", "full", "adapted full"} & flagged


def test_differences_are_paired_and_name_their_rivals(found: dict[str, Any]) -> None:
    means = {
        (d["method"], d["against"]): (d["mean"], d["documents"]) for d in found["differences"] if d["metric"] == "f1"
    }
    assert means["patch", "distilled"] == (0.5, 2) and means["distilled", "full"] == (-0.5, 2)
    assert means["patch", "adapted full"] == (-0.5, 4) and means["patch", "swapped"] == (0.5, 4)
    assert ("patch", "parrot") not in means and ("patch", "distilled, slow") not in means  # the first row of a method


def test_forgetting_is_a_rise_in_loss_and_a_fall_in_scores(found: dict[str, Any]) -> None:
    rows = {row["measure"]: row for row in found["forgetting"]}
    assert {row["method"] for row in found["forgetting"]} == {"patch"}
    assert rows["loss on unrelated text, patch on minus bare"]["mean"] == pytest.approx((0.5 + 3 * 0.1) / 4)
    beside = rows["notes: f1 with the document in the prompt, another's patch on minus bare"]
    assert beside["mean"] == pytest.approx(0.5 - 0.75) and beside["documents"] == 4


def test_scores_by_tag_and_by_two_of_them(found: dict[str, Any]) -> None:
    rows = {(r["tag"], r["value"]): r["mean"] for r in found["by_tag"] if (r["method"], r["metric"]) == ("full", "f1")}
    assert rows == {
        ("length", 100): 1.0,
        ("length", 200): 0.5,
        ("kind", "a"): 0.75,
        ("kind×length", "a×100"): 1.0,
        ("kind×length", "a×200"): 0.5,
    }


def test_costs_are_set_against_rivals_by_what_methods_say(
    base: BaseModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row of each; where there is none, nothing is said of it."""
    monkeypatch.setattr(METHODS["distillation"], "rival", "training")
    full, patch, distilled, other = (
        {"compile_flops": once, "query_flops": query, "timing": {}}
        for once, query in ((0.0, 10.0), (100.0, 1.0), (1000.0, 3.0), (5000.0, 2.0))
    )
    rows = {"full": full, "patch": patch, "distilled": distilled, "distilled, slow": other}
    methods = collected(base, tmp_path, **rows)["methods"]
    assert methods["patch"]["break_even"] == {"re-prefilling": (pytest.approx(100 / 9), None), "training": (0.0, None)}
    assert methods["full"]["break_even"] == {"re-prefilling": None, "training": (0.0, 142.0)}  # of 142.9
    assert METHODS["random_eviction"].rival is None  # which is a cache, but not of the document


def test_what_was_measured_on_what_is_recorded(base: BaseModel, tmp_path: Any) -> None:
    times = {"patch": 59.0, "distilled": 61.0}
    costs = {
        label: {"compile_flops": None, "query_flops": None, "timing": {"compile_seconds": time}}
        for label, time in times.items()
    }
    found = collected(base, tmp_path, **costs)
    assert found["costs"] == {"task": "notes", "documents": 3, "tokens": 16}
    assert [label for label, about in found["methods"].items() if about["timing"]["while_counted"]] == ["distilled"]
    assert found["unrelated"]["source"] == "wikitext2_test" and found["unrelated"]["windows"] == 4
    assert {label: about["seeds"] for label, about in found["methods"].items() if about["seeds"]} == {
        "distilled": [0],
        "distilled, slow": [0],
    }
