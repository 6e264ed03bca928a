"""The replies that `hyperlora compare` leaves beside its results, two methods of them at a time."""

import json
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hyperlora.errors import InputError, nearest
from hyperlora.evaluation.comparison import Comparison
from hyperlora.reading import read_lines
from hyperlora.settings import explain

REPLIES = "replies.jsonl"


class _Asked(BaseModel):
    """One line: a question on a document, and what the methods that were asked it said."""

    model_config = ConfigDict(strict=True)

    task: str
    document: str
    text: str
    question: str
    accepted: list[str]
    replies: dict[str, str]


def read_comparisons(
    folder: Path, first: str, second: str, task: str | None = None, count: int | None = None
) -> list[Comparison]:
    """The questions that both methods were asked, in the order of the file; only those of `task`, the first `count`.

    Ids name task, document and question, so that a comparison that grows by methods or tasks leaves them as they are.

    Raises:
        InputError: there are no replies, a line is broken (file, line and field are named), the task or a method is
            not among them (with the nearest names), or no question was asked of both methods.
    """
    path = folder / REPLIES
    if first == second:
        raise InputError(f"both methods are {first!r}; name two different ones")
    if not path.exists():
        raise InputError(f"{path} is missing; run `hyperlora compare EXPERIMENT -o {folder}` first")
    found: list[Comparison] = []
    asked: Counter[tuple[str, str]] = Counter()  # questions on each document
    labels: set[str] = set()
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = _Asked.model_validate_json(line)
        except ValidationError as error:
            reason = explain(error, _Asked.model_fields)
            raise InputError(f"{path}, line {number}: {reason}; `hyperlora compare` writes the file anew") from error
        name = (record.task, record.document)
        asked[name] += 1
        if task not in (None, record.task):
            continue
        labels |= record.replies.keys()
        if first in record.replies and second in record.replies:
            replies = (record.replies[first], record.replies[second])
            identity = json.dumps([*name, asked[name]])
            found.append(Comparison(identity, record.text, record.question, tuple(record.accepted), *replies))
    tasks = {name for name, _ in asked}
    if not tasks:
        raise InputError(f"{path} is empty; compare the methods on a task that asks questions")
    if task is not None and task not in tasks:
        raise InputError(f"{path}: no task {task!r}; {nearest(task, tasks)}")
    for label in (first, second):
        if label not in labels:
            raise InputError(f"{path}: no method {label!r}; {nearest(label, labels)}")
    if not found:
        raise InputError(f"{path}: no question was asked of both {first!r} and {second!r}; name two others")
    return found[:count]
