"""Instructions to follow."""

from typing import ClassVar, Literal

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.items import Item
from hyperlora.data.sources import load
from hyperlora.tasks.contract import Positive, Task


class Instructions(Task):
    """Instructions with the reply that a person or a large model gave.

    `dolly`: the document is the context of an instruction, the question the instruction itself. `alpaca_*`, the
    validation splits of Alpaca+: the document is the instruction, a prompt to be remembered, the question its input.
    Rows without a context or an input ask nothing of a document and are left out.
    """

    name: ClassVar[str] = "instructions"
    metrics: ClassVar[tuple[str, ...]] = ("rouge_l", "f1")

    source: Literal["dolly", "alpaca_seen", "alpaca_unseen", "alpaca_human"] = "dolly"
    max_new_tokens: Positive = 128

    def load(self, base: Base) -> list[Item]:
        return self.chosen(load(self.source), f"no row of {self.source} has a document and a question")
