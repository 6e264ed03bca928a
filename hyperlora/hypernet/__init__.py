"""Hypernetwork architectures behind one contract. Adding one: a file here and a line in `HYPERNETS`."""

from hyperlora.hypernet.associative import Associative
from hyperlora.hypernet.contract import Factors, Features, Hypernet
from hyperlora.hypernet.perceiver import Perceiver

HYPERNETS: dict[str, type[Hypernet]] = {"associative": Associative, "perceiver": Perceiver}

__all__ = ["HYPERNETS", "Associative", "Factors", "Features", "Hypernet", "Perceiver"]
