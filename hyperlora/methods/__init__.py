"""Methods that remember documents, by name."""

from hyperlora.methods.adapted import AdaptedFull
from hyperlora.methods.contract import Document, Method, MethodSettings
from hyperlora.methods.distillation import Distillation
from hyperlora.methods.full import Full
from hyperlora.methods.generator import Generated
from hyperlora.methods.kv_cache import KVCache
from hyperlora.methods.none import Nothing
from hyperlora.methods.random_eviction import RandomEviction
from hyperlora.methods.summary import Summary
from hyperlora.methods.truncation import Truncation

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Full, Nothing, Truncation, Summary, KVCache, RandomEviction, Generated, AdaptedFull, Distillation)
}

__all__ = ["METHODS", "Document", "Method", "MethodSettings"]
