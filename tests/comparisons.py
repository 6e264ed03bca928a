"""A small comparison on disk, and what it gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from hyperlora.base_model import BaseModel
from hyperlora.compare.experiment import read_experiment
from hyperlora.compare.run import Comparison


@pytest.fixture
def experiment(base: BaseModel, tmp_path: Path) -> Path:
    """Five documents with one or two questions, a patch, and what it is compared with."""
    from .conftest import TEXT, make_generator  # which imports this file

    sentences = [line.strip() for line in TEXT.splitlines() if line.strip()]
    make_generator(base).save_pretrained(tmp_path / "generator")
    rows = [
        {
            "id": f"doc-{number}",
            "context": f"{sentences[number % 4]} Note {number}.",
            "questions": [{"question": f"What is note {number}?", "answers": [f"note {number}"]}] * (1 + number % 2),
        }
        for number in range(5)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "unrelated.jsonl").write_text(json.dumps({"id": "u", "text": TEXT[::-1]}) + "\n")
    path = tmp_path / "experiment.yaml"
    path.write_text(f"""
name: tiny
base: tiny
seeds: [0, 1]
unit: 2
tasks:
  notes: {{task: jsonl, path: {tmp_path / "data.jsonl"}, max_new_tokens: 4}}
methods:
  patch: {{method: generator, path: {tmp_path / "generator"}}}
  head: {{method: truncation, match: patch}}
  cache: {{method: kv_cache, items: 3}}
  evicted: {{method: random_eviction, match: patch}}
unrelated: {tmp_path / "unrelated.jsonl"}
forgetting_documents: 3
costs: {{documents: 1, tokens: 3}}
""")
    return path


def without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timing(found) for key, found in value.items() if key != "timing"}
    return [without_timing(found) for found in value] if isinstance(value, list) else value


def compared(experiment: Path, base: BaseModel, folder: Path, shard: tuple[int, int] = (1, 1)) -> Comparison:
    comparison = Comparison(read_experiment(experiment), base, folder, shard)
    comparison.run()
    return comparison


def results(folder: Path) -> Any:
    return without_timing(json.loads((folder / "results.json").read_text()))
