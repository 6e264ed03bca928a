"""Reading text that others wrote: whole documents, and the lines of plain or gzipped files."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyperlora.errors import InputError

_CONVERT = "convert it, e.g. with iconv -t UTF-8"


def read_document(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError when it is missing, empty, binary or in another encoding."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return decode_document(data, str(path))


def decode_document(data: bytes, name: str) -> str:
    """The text of a document's bytes; `name` stands in the error messages."""
    if b"\0" in data:
        raise InputError(f"{name} is a binary file; convert it to plain UTF-8 text first")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); {_CONVERT}") from error
    if not text.strip():
        raise InputError(f"{name} is empty; give a document with text")
    return text


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, gzipped when its name ends in `.gz`, one at a time and with their line ends.

    Raises:
        InputError: the file is missing, binary, in another encoding (the line is named), or a damaged gzip file.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if b"\0" in line:
                    raise InputError(f"{path}, line {number} is binary; give a file of UTF-8 text")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number} is not UTF-8 text (byte {error.start}); {_CONVERT}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = str(error).strip().rstrip(".")
        raise InputError(
            f"{path} is not a whole gzip file ({reason}, after line {number}); copy or compress it again"
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def half_character(text: str) -> bool:
    """Whether a text holds half of a surrogate pair: JSON can spell it, but no file and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def read_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """What the lines of a JSONL file hold, blank ones left out: line number, "file, line n" for messages, and value.

    Raises:
        InputError: as `read_lines`, and where a line is not JSON, or JSON that cannot be read.
    """
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield number, where, json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
        except ValueError as error:  # Python refuses more than 4,300 digits
            raise InputError(f"{where}: a whole number has too many digits to be read; shorten it") from error
        except RecursionError as error:
            raise InputError(f"{where}: lists or objects are nested too deeply to be read; flatten them") from error
