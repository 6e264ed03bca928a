"""Invented facts."""

from typing import ClassVar

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.facts import fact_document
from hyperlora.data.items import Item
from hyperlora.tasks.contract import Positive, Task


class Facts(Task):
    """Documents of `facts` facts of the test split, every one asked. `new_attributes`: of kinds never trained on."""

    name: ClassVar[str] = "facts"

    facts: Positive = 2
    new_attributes: bool = False

    def load(self, base: Base) -> list[Item]:
        numbers = range(self.items)
        return [fact_document(f"{self.seed}-{n}", self.facts, "test", self.new_attributes) for n in numbers]
