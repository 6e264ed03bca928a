"""eval/bench/ablation.py: every piece that is taken out is one, and comes back."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from hyperlora.base_model import BaseModel

from .conftest import make_generator


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", Path(__file__).parents[1] / "eval/bench/ablation.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_piece_can_be_taken_out_and_comes_back(
    base: BaseModel, documents: list[str], ablation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_generator(base, rank=40)
    ids = [generator.encoder.tokenize(text) for text in documents]

    def factors(*_: object, **__: object) -> np.ndarray:
        return torch.cat([(b @ a).flatten() for a, b in generator.factors(ids).values()]).numpy()

    monkeypatch.setattr(ablation, "fact_items", lambda *_, **__: [])
    monkeypatch.setattr(ablation, "qa_items", lambda *_, **__: [])
    monkeypatch.setattr(ablation, "scores", factors)
    rise = {"scores": {"patch - bare": {"loss": (0.0, 0.0, 0.0)}}}
    monkeypatch.setattr(ablation, "evaluate_forgetting", lambda *_: rise)
    bench = ablation.Bench(generator, 1)
    whole, names = bench.measure()[0], []
    for name, change in ablation.pieces(generator):
        names.append(name)
        less = bench.measure(change)[0]
        assert np.isfinite(less).all(), name
        assert np.linalg.norm(less - whole) > 1e-3 * np.linalg.norm(whole), name
        assert (bench.measure()[0] == whole).all(), name
    assert len(set(names)) == len(names) == 8 + 2 + 4 + len(generator.sites) + 2
