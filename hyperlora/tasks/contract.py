"""What a task is: documents, and what is asked of them or the text that follows them."""

import zlib
from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.items import Item
from hyperlora.errors import InputError

Positive = Annotated[int, Field(gt=0)]


class Task(BaseModel):
    """The settings of a task, and its documents.

    Attributes:
        name: in the registry and in experiments.
        kind: `answers` are generated and scored; a `text` that follows the document is scored token by token.
        metrics: names of its scores, the main one first.
        items: largest number of documents; a data set may hold fewer.
        seed: which documents and questions are chosen, and in which order.
        max_new_tokens: longest answer, in tokens (`answers` only).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    kind: ClassVar[Literal["answers", "text"]] = "answers"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match", "contains")

    items: Positive = 300
    seed: int = 0
    max_new_tokens: Positive = 32

    @abstractmethod
    def load(self, base: Base) -> list[Item]:
        """The documents, with stable ids that are unique in the task; the same for the same settings.

        Raises:
            InputError: the data cannot be read, or no document is left of it.
        """

    def hash(self, text: str) -> int:
        """What documents and questions are ordered by; with seed 0 as in `hyperlora evaluate`."""
        return zlib.crc32(text.encode(), self.seed)

    def chosen(self, items: Iterable[Item], requirement: str) -> list[Item]:
        """The first `self.items` documents by hash.

        Raises:
            InputError: there are none, because none meets the `requirement`; or two have the same id.
        """
        found: dict[str, Item] = {}
        for item in items:
            if item.id in found:
                raise InputError(f"two documents of the task {self.name} are called {item.id!r}; give them other ids")
            found[item.id] = item
        if not found:
            raise InputError(f"the task {self.name} has no documents: {requirement}")
        return [found[name] for name in sorted(found, key=self.hash)[: self.items]]
