"""What a method is: it turns documents into memories, without seeing a question."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

from hyperlora.base_model import BaseModel as Base
from hyperlora.memory import Memory

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A document to remember. What is random about a method is a function of its seed and of `id`."""

    id: str
    text: str


def stable_seed(*parts: object) -> int:
    """A random seed that is a function of `parts` on every machine and in every process."""
    return zlib.crc32("/".join(map(str, parts)).encode())


class MethodSettings(BaseModel):
    """Settings of a method; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(ABC):
    """One way to remember documents, made for one base.

    Attributes:
        name: in the registry and in experiments.
        Settings: the method's own settings.
        budgeted: needs a number of resident bytes for every document, taken from another method.
        seeded: other seeds give other memories.
        revision: raised when a change of the code changes the memories, so that cached results are not used again.
        compresses: is judged beside as much of the document's text as its memory would hold.
        sized_by: settings that the size of a memory depends on.
        rival: what its costs are called where those of all methods are set against them; None for no such comparison.
        common: one dictionary for all methods of a run, for what several of them would make alike; None for a method
            that does all of its work itself.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    budgeted: ClassVar[bool] = False
    seeded: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    sized_by: ClassVar[tuple[str, ...]] = ()
    rival: ClassVar[str | None] = None
    revision: ClassVar[int] = 1

    def __init__(self, base: Base, settings: Any, seed: int = 0):
        self.base, self.settings, self.seed = base, settings, seed
        self.common: dict[Hashable, Any] | None = None

    @abstractmethod
    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        """A memory of every document; the result for one does not depend on the others.

        Args:
            budgets: resident bytes at 16 bits that each memory may take, for methods that are `budgeted`.
        """

    def prepare(self) -> None:  # noqa: B027 (most methods have nothing to make)
        """Make what all documents share and `compile` would make at its first call; no cost of a document."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes, which is determined by `key`: taken from `common` when it is there."""
        if self.common is None:
            return make()
        if key not in self.common:
            self.common[key] = make()
        made: T = self.common[key]
        return made

    def identity(self) -> dict[str, Any]:
        """What besides name, settings, seed and base determines the memories, such as the hash of trained weights."""
        return {}

    @classmethod
    def summary(cls) -> str:
        """The first line of the method's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]
