"""Documents and questions of one's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from hyperlora.base_model import BaseModel as Base
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.reading import half_character, read_records
from hyperlora.settings import explain
from hyperlora.tasks.contract import Task


def _checked(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    if half_character(text):
        raise ValueError("must not hold half a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_checked)]
Id = Annotated[Text, BeforeValidator(lambda given: str(given) if isinstance(given, int) else given)]


class _Asked(BaseModel):
    question: Text
    answers: list[Text] = Field(min_length=1)


class _Document(BaseModel):
    id: Id | None = None
    context: Text


class _One(_Document, _Asked):
    pass


class _Many(_Document):
    questions: list[_Asked] = Field(min_length=1)


class Jsonl(Task):
    """A `.jsonl` or `.jsonl.gz` file of documents with questions, asked as they are written.

    A line is `{"context", "questions": [{"question", "answers": [..]}]}` or `{"context", "question", "answers": [..]}`.
    With `"id"` it has an id, else its line number. Every answer counts as right.
    """

    name: ClassVar[str] = "jsonl"

    path: Path

    def load(self, base: Base) -> list[Item]:
        return self.chosen(self._read(), f"{self.path} is empty; write one JSON object to a line")

    def _read(self) -> Iterator[Item]:
        lines: dict[str, int] = {}
        for number, where, record in read_records(self.path):
            item = _item(record, number, where)
            if item.id in lines:
                raise InputError(f"{where}: the id {item.id!r} is that of line {lines[item.id]}; give it another")
            lines[item.id] = number
            yield item


def _item(record: Any, number: int, where: str) -> Item:
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, not {type(record).__name__}")
    try:
        if "questions" in record:
            many = _Many.model_validate(record)
            document: _Document = many
            asked = many.questions
        else:
            document = one = _One.model_validate(record)
            asked = [one]
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, ())}") from error
    questions = tuple(Question(each.question, min(each.answers, key=len), tuple(each.answers)) for each in asked)
    return Item(str(number) if document.id is None else document.id, document.context, questions)
