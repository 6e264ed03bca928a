"""hyperlora: a document becomes a LoRA patch for a frozen language model in a single forward pass."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Generator", "Patch", "__version__", "answer", "load_base", "patched"]

if TYPE_CHECKING:
    from hyperlora.base_model import load_base
    from hyperlora.evaluation.answers import answer
    from hyperlora.generator import Generator
    from hyperlora.inject import patched
    from hyperlora.patch import Patch

_HOMES = {
    "Generator": "hyperlora.generator",
    "Patch": "hyperlora.patch",
    "answer": "hyperlora.evaluation.answers",
    "load_base": "hyperlora.base_model",
    "patched": "hyperlora.inject",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: torch and transformers take seconds, and `hyperlora --help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'hyperlora' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
