"""Tasks that methods are compared on, by name."""

from typing import Any

from pydantic import ValidationError

from hyperlora.errors import InputError, nearest
from hyperlora.settings import explain
from hyperlora.tasks.contract import Task
from hyperlora.tasks.facts import Facts
from hyperlora.tasks.instructions import Instructions
from hyperlora.tasks.jsonl import Jsonl
from hyperlora.tasks.language_modelling import LanguageModelling
from hyperlora.tasks.long_documents import LongDocuments
from hyperlora.tasks.needles import Needles
from hyperlora.tasks.qa import QA

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (QA, Facts, Needles, LanguageModelling, Instructions, LongDocuments, Jsonl)
}


def read_task(spec: dict[str, Any], where: str) -> Task:
    """A task from `{"task": name}` and its settings; `where` starts the error messages.

    Raises:
        InputError: an unknown task or key (with the nearest known ones) or a wrong value, in one line.
    """
    if not isinstance(spec, dict) or "task" not in spec:
        raise InputError(f"{where}: expected keys and values, among them 'task' ({', '.join(TASKS)})")
    name = str(spec["task"])
    if name not in TASKS:
        raise InputError(f"{where}: unknown task {name!r}; {nearest(name, TASKS)}")
    try:
        return TASKS[name].model_validate({key: value for key, value in spec.items() if key != "task"})
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, TASKS[name].model_fields)}") from error


__all__ = ["TASKS", "Task", "read_task"]
