"""Which base model it is: by its architecture and by a sample of its weights."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from hyperlora.structure import text_config


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a base model: `config` hashes its architecture, `weights` a sample of every parameter in bfloat16.

    `weights` is None for quantised and float16 models, whose parameters cannot be compared with the original's.
    """

    config: str
    weights: str | None

    def same(self, other: "Fingerprint") -> bool:
        if self.weights is None or other.weights is None:
            return self.config == other.config
        return self == other


def fingerprint(model: Any) -> Fingerprint:
    """Hash of the architecture and of 64 evenly spaced values of every parameter, equal for float32 and bfloat16."""
    config = text_config(model)
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    shape = json.dumps({key: getattr(config, key, None) for key in keys}, sort_keys=True)
    # float16 rounds differently from bfloat16, and packed weights are not comparable at all.
    incomparable = getattr(model, "quantization_method", None) is not None or model.dtype == torch.float16
    return Fingerprint(hashlib.sha256(shape.encode()).hexdigest()[:16], None if incomparable else sampled(model))


def sampled(model: Any) -> str:
    """Hash of that sample of the weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
