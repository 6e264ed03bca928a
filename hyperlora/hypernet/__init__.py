"""Hypernetwork architectures behind one contract. Adding one: a file here and a line in `HYPERNETS`."""

from hyperlora.hypernet.associative import Associative
from hyperlora.hypernet.contract import Factors, Features, Hypernet

HYPERNETS: dict[str, type[Hypernet]] = {"associative": Associative}

__all__ = ["HYPERNETS", "Associative", "Factors", "Features", "Hypernet"]
