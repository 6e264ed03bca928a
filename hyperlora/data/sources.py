"""Named data sets: files in the directory of the setting `HYPERLORA_DATA`, else the hub, else a path of one's own."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError, nearest
from hyperlora.reading import read_lines

FEW_WORDS = " Answer in a few words."


@dataclass(frozen=True)
class Source:
    """A data set: its file under `HYPERLORA_DATA`, and where the hub has it."""

    file: str
    hub: str
    subset: str | None
    split: str


_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")

SOURCES = {
    "squad_train": Source("squad_train_subset.jsonl.gz", "rajpurkar/squad", None, "train"),
    "squad_dev": Source("squad_dev_partial.jsonl.gz", "rajpurkar/squad", None, "validation"),
    "squadshifts_new_wiki": Source("squadshifts_new_wiki.jsonl.gz", "squadshifts", "new_wiki", "test"),
    "wikitext2_train": Source("wikitext2_raw_train_first1M.txt.gz", *_WIKITEXT, "train"),
    "wikitext2_valid": Source("wikitext2_raw_valid.txt.gz", *_WIKITEXT, "validation"),
    "wikitext2_test": Source("wikitext2_raw_test.txt.gz", *_WIKITEXT, "test"),
    "c4": Source("c4_sample.jsonl.gz", "allenai/c4", "realnewslike", "validation"),
    "speeches": Source("us_speeches.jsonl.gz", "", None, ""),
    "books": Source("gutenberg_books.jsonl.gz", "", None, ""),
}


def load(name: str) -> list[Item]:
    """All items of a named source or of a `.jsonl[.gz]` or `.txt[.gz]` file.

    JSONL lines hold `text`, or `context` and `qas` (a list of `{"question", "answers"}`); a text file is cut into
    articles at WikiText headings, else into paragraphs.

    Raises:
        InputError: unknown name, missing file, or a malformed line (named).
    """
    if name in SOURCES:
        source = SOURCES[name]
        if folder := os.environ.get("HYPERLORA_DATA"):
            return list(_read(Path(folder) / source.file))
        return list(_from_hub(name, source))
    if name.removesuffix(".gz").endswith((".jsonl", ".txt")):
        return list(_read(Path(name)))
    raise InputError(f"unknown data source {name!r}; {nearest(name, SOURCES)}; or give a .jsonl or .txt file")


def _read(path: Path) -> Iterator[Item]:
    if not path.is_file():
        raise InputError(f"no data file {path}; set HYPERLORA_DATA to the folder that holds it")
    lines = read_lines(path)
    if path.name.removesuffix(".gz").endswith(".txt"):
        yield from _articles("".join(lines), path.name)
        return
    for number, line in enumerate(lines, 1):
        try:
            item = item_of(json.loads(line), f"{path.name}-{number}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: {_describe(error)}") from error
        yield item


def _describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]


def item_of(record: dict[str, Any], default_id: str) -> Item:
    """An item from one JSONL record. Raises KeyError or TypeError when a field is missing or of a wrong type."""
    if not isinstance(record, dict):
        raise TypeError(f"expected a JSON object, not {type(record).__name__}")
    text = record["context"] if "qas" in record else record["text"]
    if not isinstance(text, str):
        raise TypeError(f"the document must be a string, not {type(text).__name__}")
    return Item(str(record.get("id", default_id)), text, tuple(_question(qa) for qa in record.get("qas", ())))


def _question(qa: dict[str, Any]) -> Question:
    if not isinstance(qa["answers"], list) or not all(isinstance(answer, str) for answer in qa["answers"]):
        raise TypeError("answers must be a list of strings")
    answers = [answer for answer in qa["answers"] if answer.strip()]
    if not answers:
        raise ValueError(f"question {qa['question']!r} has no answer")
    return Question(qa["question"].strip() + FEW_WORDS, min(answers, key=len), tuple(answers))


def _articles(text: str, name: str) -> Iterator[Item]:
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith(" = ") and not line.startswith(" = = "):
            parts.append([])
        if line.strip():
            parts[-1].append(line.strip())
    for number, part in enumerate(part for part in parts if part):
        yield Item(f"{name}-{number}", "\n".join(part))


def _from_hub(name: str, source: Source) -> Iterator[Item]:
    if not source.hub:
        raise InputError(f"{name} is not on the hub: set HYPERLORA_DATA to the folder that holds {source.file}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError("reading data from the hub needs the extra: pip install 'hyperlora[eval]'") from error
    try:
        rows = load_dataset(source.hub, source.subset, split=source.split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load {source.hub} from the hub; set HYPERLORA_DATA to a folder with {source.file}"
        ) from error
    if source.hub == "Salesforce/wikitext":
        yield from _articles("\n".join(row["text"].rstrip("\n") for row in rows), name)
        return
    contexts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "context" in row:
            contexts.setdefault(row["context"], []).append(
                {"question": row["question"], "answers": row["answers"]["text"]}
            )
        else:
            contexts[row["text"]] = []
    for number, (text, qas) in enumerate(contexts.items()):
        yield item_of({"context": text, "qas": qas, "id": f"{name}-{number}"}, name)
