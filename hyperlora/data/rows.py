"""What the rows of data sets become: a document, and what is asked of it."""

from typing import Any

from hyperlora.data.items import Item, Question

FEW_WORDS = " Answer in a few words."


def item_of(record: dict[str, Any], default_id: str) -> Item:
    """An item from one JSONL record.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, of a wrong type, or empty where it must not be.
    """
    if not isinstance(record, dict):
        raise TypeError(f"expected a JSON object, not {type(record).__name__}")
    text = record["context"] if "qas" in record else record["text"]
    if not isinstance(text, str):
        raise TypeError(f"the document must be a string, not {type(text).__name__}")
    asked = record.get("qas", [])
    if not isinstance(asked, list) or not all(isinstance(qa, dict) for qa in asked):
        raise TypeError("qas must be a list of JSON objects")
    if asked and not text.strip():
        raise ValueError("the context is empty, but questions are asked about it; give it text or leave the line out")
    return Item(str(record.get("id", default_id)), text, tuple(_question(qa) for qa in asked))


def _question(qa: dict[str, Any]) -> Question:
    if not isinstance(qa["answers"], list) or not all(isinstance(answer, str) for answer in qa["answers"]):
        raise TypeError("answers must be a list of strings")
    if not isinstance(qa["question"], str):
        raise TypeError(f"question must be a string, not {type(qa['question']).__name__}")
    answers = [answer for answer in qa["answers"] if answer.strip()]
    if not answers:
        raise ValueError(f"question {qa['question']!r} has no answer")
    return Question(qa["question"].strip() + FEW_WORDS, min(answers, key=len), tuple(answers))


def asked_of_context(row: dict[str, Any], name: str) -> Item | None:
    """A Dolly row: its instruction is asked about its context, called `input` in some copies. None without context."""
    if "context" in row:
        return _instructed(name, row["context"], row["instruction"], row["response"])
    return _instructed(name, row["input"], row["instruction"], row["output"])


def asked_yes_or_no(row: dict[str, Any], name: str) -> Item | None:
    """A BoolQ row of the hub (`passage`, `question`, `answer`: true or false), or of a file like that of other sets."""
    if "passage" not in row:
        return item_of(row, name)
    answer = "yes" if row["answer"] else "no"
    return item_of({"context": row["passage"], "qas": [{"question": row["question"], "answers": [answer]}]}, name)


def asked_of_prompt(row: dict[str, Any], name: str) -> Item | None:
    """An Alpaca row: its instruction is the document, its input the question. None without an input."""
    return _instructed(name, row["instruction"], row["input"], row["output"])


def _instructed(name: str, *parts: str) -> Item | None:
    document, question, reply = (part.strip() for part in parts)
    return Item(name, document, (Question(question, reply, (reply,)),)) if document and question and reply else None
