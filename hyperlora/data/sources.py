"""Named data sets: files in the directory of the setting `HYPERLORA_DATA`, else the hub, else a path of one's own."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperlora.data.items import Item, is_text
from hyperlora.data.rows import asked_of_context, asked_of_prompt, asked_yes_or_no, item_of
from hyperlora.errors import InputError, nearest
from hyperlora.reading import half_character, read_lines, read_records


@dataclass(frozen=True)
class Source:
    """A data set: its file under `HYPERLORA_DATA`, where the hub has it ("": nowhere), and what to make of a row.

    `item` takes a row and the id that it gets when it has none; None is a row to leave out.
    """

    file: str
    hub: str = ""
    subset: str | None = None
    split: str = ""
    item: Callable[[dict[str, Any], str], Item | None] = item_of


_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")

SOURCES = {
    "squad_train": Source("squad_train_subset.jsonl.gz", "rajpurkar/squad", None, "train"),
    "squad_dev": Source("squad_dev_partial.jsonl.gz", "rajpurkar/squad", None, "validation"),
    "squadshifts_new_wiki": Source("squadshifts_new_wiki.jsonl.gz", "squadshifts", "new_wiki", "test"),
    "boolq_train": Source("boolq_train.jsonl.gz", "google/boolq", None, "train", asked_yes_or_no),
    "wikitext2_train": Source("wikitext2_raw_train_first1M.txt.gz", *_WIKITEXT, "train"),
    "wikitext2_valid": Source("wikitext2_raw_valid.txt.gz", *_WIKITEXT, "validation"),
    "wikitext2_test": Source("wikitext2_raw_test.txt.gz", *_WIKITEXT, "test"),
    "c4": Source("c4_sample.jsonl.gz", "allenai/c4", "realnewslike", "validation"),
    "speeches": Source("us_speeches.jsonl.gz"),
    "books": Source("gutenberg_books.jsonl.gz"),
    "stories": Source("squality_stories_train.jsonl.gz"),
    "dolly": Source("dolly_3k.jsonl.gz", "databricks/databricks-dolly-15k", None, "train", asked_of_context),
    "alpaca_seen": Source("alpaca_plus_validation_seen.jsonl.gz", item=asked_of_prompt),
    "alpaca_unseen": Source("alpaca_plus_validation_unseen.jsonl.gz", item=asked_of_prompt),
    "alpaca_human": Source("alpaca_plus_validation_human.jsonl.gz", item=asked_of_prompt),
}


def load(name: str) -> list[Item]:
    """All items of a named source or of a `.jsonl[.gz]` or `.txt[.gz]` file.

    JSONL lines hold `text`, or `context` and `qas` (a list of `{"question", "answers"}`); a text file is cut into
    articles at WikiText headings, or is one item.

    Raises:
        InputError: unknown name, missing file, or a malformed line (named).
    """
    if name in SOURCES:
        source = SOURCES[name]
        if folder := os.environ.get("HYPERLORA_DATA"):
            if not (path := Path(folder) / source.file).is_file():
                raise InputError(
                    f"no data file {path} for {name}; put it there, or unset HYPERLORA_DATA to use the hub"
                )
            return list(_read(path, source.item))
        return list(_from_hub(name, source))
    if name.removesuffix(".gz").endswith((".jsonl", ".txt")):
        return list(_read(Path(name), item_of))
    raise InputError(f"unknown data source {name!r}; {nearest(name, SOURCES)}; or give a .jsonl or .txt file")


def load_texts(name: str) -> list[Item]:
    """Those that are more than a word."""
    return [item for item in load(name) if is_text(item.text)]


def _read(path: Path, make: Callable[[dict[str, Any], str], Item | None]) -> Iterator[Item]:
    if not path.is_file():
        raise InputError(f"no data file {path}; give one that there is, or the name of a source")
    if path.name.removesuffix(".gz").endswith(".txt"):
        yield from _articles("".join(read_lines(path)), path.name)
        return
    for number, where, record in read_records(path):
        try:
            item = make(record, f"{path.name}-{number}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(f"{where}: {reason}") from error
        if item is not None:
            _check_characters(item, where)
            yield item


def _check_characters(item: Item, where: str) -> None:
    texts = [item.id, item.text, *(text for asked in item.questions for text in (asked.text, *asked.accepted))]
    if any(map(half_character, texts)):
        raise InputError(f"{where}: half a surrogate pair, such as \\ud83d alone, is no character; write both halves")


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
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"cannot load {source.hub} from the hub; set HYPERLORA_DATA to a folder with {source.file}"
        ) from error
    if source.hub == "Salesforce/wikitext":
        yield from _articles("\n".join(row["text"].rstrip("\n") for row in rows), name)
        return
    if source.item is not item_of:
        made = (source.item(row, f"{name}-{number}") for number, row in enumerate(rows))
        yield from (item for item in made if item is not None)
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
