"""Writing so that nothing is ever half there: to a temporary name beside the target, then renamed, or line by line."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hyperlora.errors import InputError


@contextmanager
def new_directory(path: Path, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary directory that takes the name `path` when the block ends well and vanishes when it does not.

    Args:
        marker: a file that every such directory has; `force` replaces no other.

    Raises:
        InputError: `path` may not be replaced, or the disk cannot be written.
    """
    path = path.resolve()
    check_directory(path, marker, force)
    partial: Path | None = None
    replaced: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        partial.chmod(0o755)
        yield partial
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        check_directory(path, marker, force)  # it may have appeared meanwhile
        if force and path.exists():
            replaced = partial.with_name(partial.name + "-old")
            os.replace(path, replaced)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if replaced is not None and replaced.exists():
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:  # stopped between the two renames
                os.replace(replaced, path)
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def check_free(path: Path, force: bool) -> None:
    """Raises InputError when the file `path` may not be written: there is one, without `force`, or a directory."""
    if path.is_dir():
        raise InputError(f"{path} is a directory; choose another output")
    if path.exists() and not force:
        raise InputError(f"{path} already exists; choose another output or pass --force to replace it")


def check_directory(path: Path, marker: str, force: bool) -> None:
    """Raises InputError when the directory `path` may not be written: there is one that is not empty, and it has no
    file `marker`, so that it is something else; or it has one, and `force` is not set."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{path} already exists and is a file; choose another output")
    held = sorted(entry.name for entry in path.iterdir())
    if held and marker not in held:
        raise InputError(f"{path} already exists and holds other things ({held[0]}); choose another output")
    if held and not force:
        raise InputError(f"{path} already exists; choose another output or pass --force (force=True) to replace it")


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` in one step."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def read_kept(path: Path) -> dict[str, Any]:
    """What `keep` has appended to a file, by key; of two with one key the last. A line that a kill cut short is passed
    over."""
    kept = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line)
            kept[record["key"]] = record["value"]
        except (ValueError, LookupError, TypeError):
            continue
    return kept


def keep(path: Path, values: Mapping[str, Any]) -> None:
    """Append values by key to a JSONL file, all of them at once; behind a line that a kill cut short on a new one."""
    lines = [json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in values.items()]
    with path.open("a+b") as file:
        broken = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            broken = file.read(1) != b"\n"
        file.write(b"\n" * broken + b"".join(lines))


def sha256(data: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def push_folder(save: Callable[[Path], None], repository: str, private: bool, token: str | None) -> str:
    """Upload what `save` writes to the hub repository `repository` (user/name) and return its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        save(Path(scratch) / "upload")
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=Path(scratch) / "upload"))


def may_be_on_hub(name: str | Path) -> bool:
    """Whether a name may stand for a hub repository: user/name."""
    return not Path(name).is_absolute() and str(name).count("/") == 1 and not str(name).startswith(".")


def from_hub(what: str, repository: str, files: Sequence[str]) -> Path:
    """The folder that these files of a hub repository were downloaded to, or lay in already.

    Args:
        what: is wanted, for the error.

    Raises:
        InputError: there is no such repository, or no way to it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"no {what} {repository}: neither a directory here nor to be had from the hub") from error
