"""The contract of a hypernetwork: tensors of a batch of documents in, what to write to every site out, in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hyperlora.errors import InputError
from hyperlora.rank_cap import cap_rank, cap_ranks
from hyperlora.statistics import SiteStatistics
from hyperlora.structure import Site

# Factors of one site for a batch of documents: A (documents, rank, d_in) and B (documents, d_out, rank); where they are
# the same for all documents, once.
Pair = tuple[Tensor, Tensor]
# What a hypernetwork writes to one site: a Pair, or what it knows how to turn into one. Tuples of tensors and of such
# tuples, in which a training engine finds the tensors.
Written = tuple[Any, ...]
# Chunks of a long document are joined at this multiple of the final rank.
WORKING_RANKS = 4


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


class Reading(ABC):
    """A batch of chunks that the frozen base reads for a hypernetwork, in whichever way it asks for."""

    @property
    @abstractmethod
    def features(self) -> Features:
        """What the base computes when it reads the chunks as it is; read once, without a gradient."""

    @abstractmethod
    def adapted(self, adapter: Mapping[str, Pair]) -> Features:
        """What the base computes when it reads the chunks with an adapter of one document on; differentiable in it."""

    @abstractmethod
    def memory(self, tokens: Tensor, adapter: Mapping[str, Pair], layers: Sequence[int]) -> Tensor:
        """Have the base, with an adapter of one document on, read every chunk with `tokens` (count, d_model) after it.

        The tokens stand in the place of input embeddings, in units of the chunk's own. Returns their hidden states
        behind `layers`, (documents, layers, count, d_model), differentiable in tokens and adapter.
        """


@dataclass(frozen=True)
class Shape:
    """What a hypernetwork knows of the base: the `sites` to write to, all `linears` of the layers up to the last of
    them, those of their `attention` that do not write to the residual stream, and `d_model`."""

    sites: list[Site]
    linears: list[Site]
    attention: list[Site]
    d_model: int


class Hypernet(nn.Module, ABC):
    """Maps what the base reads and the calibration of each site to LoRA factors whose scale is already folded in.

    `forward` says what is written to a site. `factors` makes a patch's A and B of it, and `join` adds what is written
    for another chunk of the same document; by themselves they take it to be a Pair.

    Attributes:
        name: of the architecture, its key in the registry.
        strengths: endings of the names of parameters that set how strong a patch is; they may learn at a rate of their
            own.
        fixed: modules beside the sites that a patch changes in the same way for every document, at `fixed_rank`.
    """

    name: ClassVar[str]
    strengths: ClassVar[tuple[str, ...]] = ()
    fixed: Sequence[Site] = ()
    fixed_rank: int = 0

    @abstractmethod
    def forward(self, reading: Reading, statistics: Sequence[SiteStatistics]) -> list[Written]:
        """What is written to each site, then the Pair of each of the `fixed` modules, once. Padding adds zero rows."""

    def factors(self, written: Sequence[Written], statistics: Sequence[SiteStatistics], rank: int) -> list[Pair]:
        """A and B of every site, of at most `rank`."""
        pairs = zip(written, statistics, strict=True)
        return cap_ranks([(a, b, b @ stat.moment.factor(a)) for (a, b), stat in pairs], rank)

    def join(self, written: Written, more: Written, statistics: SiteStatistics, rank: int) -> Written:
        """What is written to one site for several chunks, of what is for some and `more`, in memory that does not grow
        with the number of chunks; in the end `factors` makes `rank` ranks of it."""
        a, b = torch.cat([written[0], more[0]], dim=1), torch.cat([written[1], more[1]], dim=2)
        return cap_rank(a, b, WORKING_RANKS * rank, b @ statistics.moment.factor(a))

    @classmethod
    def refuse(cls, reason: str) -> InputError:
        """The error for options that cannot be used."""
        return InputError(f"options of the hypernet {cls.name}: {reason}")

    @classmethod
    def check(cls, shape: Shape, width: int, heads: int, **least: tuple[int, int]) -> None:
        """Raise InputError where a site does not write to the residual stream, whose units alone are calibrated;
        where `heads` do not divide `width`; or where an option (value, least value) is too small."""
        wrong = [site.path for site in shape.sites if site.d_out != shape.d_model]
        if wrong:
            raise InputError(f"the generator {cls.name} writes to the residual stream; {wrong[0]} does not")
        for name, (value, lowest) in (least | {"width": (width, 1), "heads": (heads, 1)}).items():
            if value < lowest:
                raise cls.refuse(f"{name} ({value}) must be at least {lowest}")
        if width % heads:
            raise cls.refuse(f"heads ({heads}) must divide width ({width})")
