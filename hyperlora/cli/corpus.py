"""The documents that the arguments of `generate` name: one alone, or a corpus that is read one document at a time."""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperlora.errors import InputError
from hyperlora.files import sha256
from hyperlora.reading import decode_document, half_character, read_document, read_records

_MANIFEST = re.compile(r"manifest(-\d+-of-\d+)?\.json")  # what `generate` calls its own files
_LONGEST_ID = 200  # bytes; a name in a file system may have 255


@dataclass(frozen=True)
class Document:
    """A text to turn into the patch directory `id` (empty: the output itself)."""

    id: str
    text: str


def lone_document(inputs: list[str]) -> Document | None:
    """The document of standard input or of a single text file; None where the arguments name a corpus."""
    if inputs == ["-"]:
        return Document("", decode_document(sys.stdin.buffer.read(), "standard input"))
    path = Path(inputs[0])
    if len(inputs) > 1 or path.is_dir() or _is_jsonl(path):
        return None
    return Document("", read_document(path))


class Corpus:
    """Documents of text files, folders and JSONL files, all of them checked before the first is used.

    Memory holds the ids and digests of the documents, never their texts: those are read again when they are wanted.

    Args:
        pattern: of names, such as `*.txt`: only files of folders that match.

    Attributes:
        digests: id to SHA-256 of the text, in the order of the documents.

    Raises:
        InputError: a document cannot be read, its id cannot name a directory or repeats, or there is none at all.
    """

    def __init__(self, inputs: list[str], pattern: str | None = None):
        if pattern and not any(Path(name).is_dir() for name in inputs):
            raise InputError("--glob chooses among the files of a folder; no folder was given")
        self._files = _named([file for name in inputs for file in _files(Path(name), pattern)])
        self.digests: dict[str, str] = {}
        for document in self._read():
            if document.id in self.digests:
                raise InputError(f"two documents are called {document.id!r}; give them different names or ids")
            self.digests[document.id] = sha256(document.text.encode())
        if not self.digests:
            raise InputError(f"no documents in {', '.join(inputs)}")

    def documents(self, ids: Collection[str]) -> Iterator[Document]:
        """Those called `ids`, in the order of the corpus. Raises InputError when one has changed since the check."""
        left = set(ids)
        for document in self._read():
            if document.id in left and sha256(document.text.encode()) == self.digests[document.id]:
                left.remove(document.id)
                yield document
        if left:
            raise InputError(f"the document {min(left)!r} changed while the corpus was read; run the command again")

    def _read(self) -> Iterator[Document]:
        for path, name in self._files:
            if name is None:
                yield from _jsonl(path)
            else:
                yield Document(name, read_document(path))


def _files(path: Path, pattern: str | None) -> Iterator[tuple[Path, Path | None]]:
    """The files that an argument names, each with the part of its path that its document is called by, or None for the
    many of a JSONL file."""
    if path.is_dir():
        try:
            found = list(path.rglob(pattern or "*"))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--glob {pattern!r}: {error}; use a pattern such as *.txt") from error
        relative = sorted(p.relative_to(path) for p in found if p.is_file())
        visible = [p for p in relative if not any(part.startswith(".") for part in p.parts)]
        yield from ((path / p, p) for p in visible)
    elif path.exists() and not path.is_file():
        raise InputError(f"{path} is a pipe or a device, but a corpus is read twice; write it to a file first")
    else:
        yield path, None if _is_jsonl(path) else Path(path.name)


def _named(files: list[tuple[Path, Path | None]]) -> list[tuple[Path, str | None]]:
    """Files with the ids of their documents, None for the many of a JSONL file. Where some would be called alike, they
    keep the endings of their names, and where that does not help their whole paths."""
    singles = [(path, short) for path, short in files if short is not None]
    names: dict[Path, str] = {}
    for given in (lambda p, s: s.with_suffix(""), lambda p, s: s, lambda p, s: p):
        left = {path: _file_id(given(path, short)) for path, short in singles if path not in names}
        counted = Counter([*left.values(), *names.values()])
        names |= {path: name for path, name in left.items() if counted[name] == 1}
    names |= {path: name for path, name in left.items() if path not in names}  # those that the corpus will refuse
    return [(path, names.get(path)) for path, _ in files]


def _is_jsonl(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _file_id(path: Path) -> str:
    """A file's path inside its folder as the name of a directory: `sub/My notes` gives `sub--My_notes`. What is too
    long ends with a hash."""
    joined = unicodedata.normalize("NFC", "--".join(part for part in path.parts if part != "/"))
    name = "".join(c if _may_be_in_a_name(c) else "_" for c in joined).lstrip("._-") or "document"
    if len(name.encode()) > _LONGEST_ID:
        kept = name.encode()[: _LONGEST_ID - 17].decode(errors="ignore")
        name = f"{kept}-{sha256(name.encode())[:16]}"
    return f"{name}-file" if _MANIFEST.fullmatch(name) else name


def _may_be_in_a_name(character: str) -> bool:
    """Letters and digits of any script with their marks, and what is harmless between them."""
    return character.isalnum() or character in "._-" or unicodedata.category(character).startswith("M")


def _checked(name: Any, where: str) -> str:
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    fits = isinstance(name, str) and name[:1].isalnum() and all(map(_may_be_in_a_name, name))
    if not fits or len(name.encode()) > _LONGEST_ID or _MANIFEST.fullmatch(name):
        raise InputError(
            f"{where}: id {name!r} cannot name a directory; use letters, digits, '.', '_' and '-', {_LONGEST_ID} bytes "
            "at most"
        )
    return name


def _jsonl(path: Path) -> Iterator[Document]:
    for _, where, record in read_records(path):
        try:
            name, text = record["id"], record["text"]
        except TypeError as error:
            raise InputError(f'{where}: not a JSON object with "id" and "text"') from error
        except KeyError as error:
            raise InputError(f"{where}: field {error} is missing") from error
        if not isinstance(text, str) or not text.strip() or half_character(text):
            raise InputError(f'{where}: "text" must be a string of valid characters, not empty')
        yield Document(_checked(name, where), text)
