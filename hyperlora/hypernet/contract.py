"""The contract of a hypernetwork: tensors of a batch of documents in, LoRA factors for every site out, in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hyperlora.statistics import SiteStatistics

# Factors of one site for a batch of documents: A (documents, rank, d_in) and B (documents, d_out, rank).
Factors = tuple[Tensor, Tensor]


@dataclass
class Features:
    """What the encoder saw of a batch of chunks; float32, zero or arbitrary where `mask` is False.

    Attributes:
        inputs: per site (documents, tokens, d_in), the module's input at each document token.
        hidden: (documents, tokens, 3, d_model): embedding, middle and last hidden state.
        words: (documents, tokens, d_model): unit unembedding row of each token.
        following: (documents, tokens, d_model): the same of the next token, zero after the last.
        mask: (documents, tokens), True at real tokens.
    """

    inputs: list[Tensor]
    hidden: Tensor
    words: Tensor
    following: Tensor
    mask: Tensor


class Hypernet(nn.Module, ABC):
    """Maps `Features` and the calibration of each site to LoRA factors whose scale is already folded in.

    Attributes:
        strengths: endings of the names of parameters that set how strong a patch is; they may learn at a rate of their
            own.
    """

    strengths: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, features: Features, statistics: Sequence[SiteStatistics]) -> list[Factors]:
        """Factors per site. Padded documents add zero rows; the rank may exceed the configured one (it is capped)."""
