"""Questions about short documents."""

from typing import ClassVar

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.items import Item
from hyperlora.data.sources import load
from hyperlora.prompt import document_ids
from hyperlora.tasks.contract import Positive, Task


class QA(Task):
    """Documents of at most `max_tokens` tokens from a SQuAD-style source, `questions` of them asked on each."""

    name: ClassVar[str] = "qa"

    source: str
    max_tokens: Positive = 200
    questions: Positive = 1

    def load(self, base: Base) -> list[Item]:
        kept = [
            Item(item.id, item.text, tuple(sorted(item.questions, key=lambda q: self.hash(q.text))[: self.questions]))
            for item in load(self.source)
            if item.questions and len(document_ids(base.tokenizer, item.text)) <= self.max_tokens
        ]
        return self.chosen(kept, f"{self.source} has none with questions and at most {self.max_tokens} tokens")
