"""Tiny random models of several architectures, a tiny tokenizer, and tiny generators for them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("HYPERLORA_DATA", None)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from hyperlora import cli
from hyperlora.base_model import BaseModel
from hyperlora.generator import Generator
from hyperlora.generator_config import GeneratorConfig
from hyperlora.recipe import Recipe

from .chat_server import server as server
from .chat_server import waits as waits
from .comparisons import experiment as experiment

TEXT = """The harbour master of Brenwick keeps a grey parrot called Admiral, and the parrot knows eleven songs.
On Tuesdays the ferry to Oskmere leaves at nine, and nobody has ever seen it leave late.
Maro the baker sells rye bread, plum cakes and a soup of smoked trout that people cross the lake for.
When the lighthouse was built, its keeper planted four cherry trees; three of them still bear fruit.
"""
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
_COMMON = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": lambda v: LlamaConfig(vocab_size=v, num_key_value_heads=2, **_COMMON),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, num_key_value_heads=2, head_dim=8, **_COMMON),
    "gemma3": lambda v: Gemma3TextConfig(
        vocab_size=v, num_key_value_heads=2, head_dim=8, sliding_window=16, query_pre_attn_scalar=8, **_COMMON
    ),
    "mistral": lambda v: MistralConfig(vocab_size=v, num_key_value_heads=2, sliding_window=16, **_COMMON),
    "phi3": lambda v: Phi3Config(vocab_size=v, num_key_value_heads=2, pad_token_id=0, **_COMMON),
    "gpt2": lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=4, n_head=4, n_positions=512),
}
_SMALL = {"width": 16, "depth": 1, "heads": 2}
OPTIONS = {
    "associative": {**_SMALL, "moves": 3, "adapter_rank": 2},
    "hybrid": {**_SMALL, "latents": 3, "moves": 3, "adapter_rank": 2, "salience": True},
    "perceiver": {**_SMALL, "latents": 3, "fixed_ranks": 2},
    "memory_tokens": {"rank": 3, "depth": 2, "heads": 2, "adapter_rank": 2},
}


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=4096
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def make_base(kind: str = "llama", seed: int = 0, chat: bool = True) -> BaseModel:
    tokenizer = make_tokenizer(chat)
    torch.manual_seed(seed)
    config = CONFIGS[kind](len(tokenizer))
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():  # random models are nearly linear at their own small initial scale
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    return BaseModel(f"tiny-{kind}", model, tokenizer)


def make_generator(base: BaseModel, hypernet: str = "associative", **settings: object) -> Generator:
    torch.manual_seed(1)
    settings = {"layers": [1, 3], "rank": 6, "moment_directions": 4, "options": OPTIONS[hypernet], **settings}
    generator = Generator(base, GeneratorConfig(hypernet=hypernet, **settings), "tiny")
    generator.calibrate([TEXT, TEXT[::-1]])
    zero = (".learned.weight", "gate.weight", "salience.weight", "to_copies.weight", "to_pointers.weight", "adapter_b")
    for name, weight in generator.hypernet.named_parameters():
        if name.endswith(zero):  # at first
            torch.nn.init.normal_(weight, std=1.0 if "learned" in name else 0.1)
    return generator.eval()


@pytest.fixture(params=sorted(CONFIGS))
def any_base(request: pytest.FixtureRequest) -> BaseModel:
    return make_base(request.param)


@pytest.fixture
def base() -> BaseModel:
    return make_base()


@pytest.fixture
def generator(base: BaseModel) -> Generator:
    return make_generator(base)


@pytest.fixture
def documents() -> list[str]:
    return TEXT.strip().splitlines()


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of a saved tiny base and of a generator for it."""
    root = tmp_path_factory.mktemp("tiny")
    base = make_base()
    base.model.save_pretrained(root / "base")
    base.tokenizer.save_pretrained(root / "base")
    base.name = str(root / "base")
    make_generator(base).save_pretrained(root / "generator")
    return str(root / "base"), str(root / "generator")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text(TEXT * 8)
    (tmp_path / "qa.jsonl").write_text(
        "".join(
            json.dumps({"id": str(i), "context": line, "qas": [{"question": "Who is it?", "answers": ["Maro"]}]}) + "\n"
            for i, line in enumerate(TEXT.strip().splitlines())
        )
    )
    text = [str(tmp_path / "text.txt")]
    return Recipe.model_validate(
        {
            "steps": 6,
            "documents": 3,
            "save_every": 3,
            "warmup": 1,
            "learning_rate": 3e-3,
            "generator": {"layers": [1, 3], "rank": 8, "moment_directions": 4, "options": OPTIONS["associative"]},
            "calibration": {"sources": text, "texts": 2, "tokens": 64},
            "mix": [
                {"task": "facts", "facts": [2, 3]},
                {"task": "qa", "sources": [str(tmp_path / "qa.jsonl")]},
                {"task": "text", "sources": text, "tokens": [20, 40], "following": 8},
            ],
            "unrelated": {"sources": text, "tokens": 16, "share": 0.5, "in_prompt": 0.5},
            "beside": {"share": 0.5},
            "evaluation": {"every": 100, "items": 4, "facts": [2]},
        }
    )


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the entry point with arguments; exit code, stdout, stderr."""

    def call(*arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hyperlora", *map(str, arguments)])
        if stdin is not None:
            reading, writing = os.pipe()
            os.write(writing, stdin)
            os.close(writing)
            monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def generate(run: Run, tiny_dirs: tuple[str, str]) -> Run:
    return lambda *arguments, **options: run("generate", "--generator", tiny_dirs[1], *arguments, **options)


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("hyperlora: error:")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
