"""Every question as every method answered it: replies.jsonl, and the report's examples."""

from collections.abc import Sequence

from hyperlora.compare.units import Record, Unit
from hyperlora.data.items import Item

_EXAMPLES = 5  # documents of a task


def replies(items: dict[str, list[Item]], finished: Sequence[tuple[Unit, list[Record]]]) -> list[Record]:
    """One row for each question: task, document (its id), text, question, accepted, and the replies of the first seed
    by method. Methods that ran on fewer documents are missing from some rows."""
    given: dict[tuple[str, str], dict[str, list[str]]] = {}
    for unit, records in finished:
        for record in records:
            if "replies" in record["own"]:
                given.setdefault((unit.task, record["document"]), {}).setdefault(unit.method, record["own"]["replies"])
    return [
        {
            "task": task,
            "document": item.id,
            "text": item.text,
            "question": question.text,
            "accepted": list(question.accepted),
            "replies": {method: found[number] for method, found in given[task, item.id].items()},
        }
        for task, documents in items.items()
        for item in documents
        if (task, item.id) in given
        for number, question in enumerate(item.questions)
    ]


def examples(rows: Sequence[Record]) -> list[Record]:
    """The first question of the first documents of every task; `document` is the text here."""
    first: dict[str, dict[str, Record]] = {}
    for row in rows:
        first.setdefault(row["task"], {}).setdefault(row["document"], row)
    return [
        {key: row[key] for key in ("task", "question", "accepted", "replies")} | {"document": row["text"]}
        for found in first.values()
        for row in list(found.values())[:_EXAMPLES]
    ]
