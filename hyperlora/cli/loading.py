"""Turn command-line options into a loaded base model or generator."""

from typing import TYPE_CHECKING, Any

from hyperlora.errors import InputError, nearest

if TYPE_CHECKING:
    from hyperlora.base_model import BaseModel
    from hyperlora.generator import Generator


def base_options(
    device: str | None, dtype: str | None, quantize: int | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Arguments for `load_base`. Raises InputError for an unknown dtype or device."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise InputError(f"unknown dtype {dtype!r}; {nearest(dtype, dtypes)}")
    try:
        where = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    if where is not None and where.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device here; use --device cpu")
    return {
        "device": where,
        "dtype": dtypes[dtype] if dtype else None,
        "quantize": quantize,
        "trust_remote_code": trust_remote_code,
    }


def load(generator: str | None, base: str | None, options: dict[str, Any]) -> "Generator":
    """The generator with its base, or with the base that the user names."""
    from hyperlora.base_model import load_base
    from hyperlora.generator import Generator

    loaded: BaseModel | None = load_base(base, **options) if base else None
    return Generator.from_pretrained(generator, loaded, **options)
