"""Hypernetwork architectures behind one contract. Adding one: a file here and a class in `HYPERNETS`."""

from hyperlora.hypernet.associative import Associative
from hyperlora.hypernet.contract import Features, Hypernet, Pair, Reading, Shape, Written
from hyperlora.hypernet.hybrid import Hybrid
from hyperlora.hypernet.memory_tokens import MemoryTokens
from hyperlora.hypernet.perceiver import Perceiver

HYPERNETS: dict[str, type[Hypernet]] = {one.name: one for one in (Associative, Hybrid, Perceiver, MemoryTokens)}

__all__ = [
    "HYPERNETS",
    "Associative",
    "Features",
    "Hybrid",
    "Hypernet",
    "MemoryTokens",
    "Pair",
    "Perceiver",
    "Reading",
    "Shape",
    "Written",
]
