"""`hyperlora generate`: documents in, PEFT adapters out."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hyperlora.cli import loading, options
from hyperlora.cli.corpus import Corpus, Document, lone_document
from hyperlora.errors import InputError
from hyperlora.files import check_directory, write_text

if TYPE_CHECKING:
    from hyperlora.generator import Generator
    from hyperlora.patch import Patch

PROVENANCE = "hyperlora.json"  # as in hyperlora.patch, which is imported late


def generate(
    inputs: Annotated[list[str], typer.Argument(help="Text files, a folder, a .jsonl[.gz] corpus, or - for stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write: the patch, or one per document.")],
    generator: options.GeneratorName = None,
    base: options.Base = None,
    batch: Annotated[int, typer.Option(min=1, help="Documents read together.")] = 8,
    together: Annotated[bool, typer.Option(help="One patch of all the documents, at the rank of one as long.")] = False,
    pattern: Annotated[str | None, typer.Option("--glob", help="Only files of a folder that match, as *.txt.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: only every n-th document, starting with the i-th.")] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Turn documents into LoRA patches, one forward pass each.

    One text file or stdin writes the patch to the output directory itself. Several files, a folder or a JSONL corpus
    (lines with "id" and "text") write one patch directory per document and a manifest; run the same command again to
    continue where it stopped. --together writes one patch of all of them instead. Under torchrun or deepspeed every
    rank does a share of a corpus.
    """
    from hyperlora import ranks

    inside = [name for name in inputs if Path(name).is_dir() and output.resolve().is_relative_to(Path(name).resolve())]
    if inside:
        raise InputError(f"{output} lies in {inside[0]}, whose files are the documents; choose an output outside of it")
    lone = lone_document(inputs)
    if lone and pattern:
        raise InputError("--glob chooses among the files of a folder; no folder was given")
    source = lone or Corpus(inputs, pattern)
    single = together or isinstance(source, Document)
    if single and (shard or ranks.launched() > 1):
        raise InputError("--shard and launchers divide a corpus; a single patch is made by one process")
    part = options.own_shard(shard)
    if single:
        check_directory(output, PROVENANCE, force)
    else:
        _check_corpus_output(output)
    loaded = loading.load(generator, base, loading.base_options(device, dtype, quantize, trust_remote_code))
    if together:
        documents = [source] if isinstance(source, Document) else list(source.documents(list(source.digests)))
        records = [_together(loaded, documents, output, force)]
    elif isinstance(source, Document):
        records = list(_write(loaded, [source], 1, output.parent, output.name, batch, force))
    else:
        records = _corpus(loaded, source, output, batch, force, part)
    ranks.leave()
    if ranks.launched() > 1:
        if part[0] > 1:
            return
        records = _gathered(source, output, part[1])
    if as_json:
        print(json.dumps(records[0] if single else records))
    else:
        for record in records:
            print(_line(record, loaded.base.attention))


def _check_corpus_output(output: Path) -> None:
    """A corpus may go into a new or empty directory, or beside patches of an earlier run."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; choose a directory")
    present = sorted(output.iterdir()) if output.exists() else []
    foreign = [p.name for p in present if not p.name.startswith((".", "manifest")) and not (p / PROVENANCE).exists()]
    if foreign:
        raise InputError(f"{output} holds other things ({foreign[0]}); choose an empty or a new directory")


def _corpus(
    generator: "Generator", corpus: Corpus, output: Path, batch: int, force: bool, part: tuple[int, int]
) -> list[dict[str, Any]]:
    """Patches of a corpus's part, skipping those that are there already, and the manifest of all of them."""
    output.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = {}
    chosen, waiting = list(corpus.digests)[part[0] - 1 :: part[1]], []
    generator_hash = generator.provenance.generator_hash
    for name in chosen:
        record = None if force else _finished(generator, generator_hash, output / name, corpus.digests[name])
        if record is None:
            waiting.append(name)
        else:
            done[name] = record
    manifest = "manifest.json" if part == (1, 1) else _part_of_manifest(part)
    try:
        for record in _write(generator, corpus.documents(waiting), len(waiting), output, None, batch, force):
            done[record["id"]] = record
    finally:
        ordered = [done[name] for name in chosen if name in done]
        write_text(output / manifest, json.dumps(ordered, indent=1) + "\n")
    return ordered


def _part_of_manifest(part: tuple[int, int]) -> str:
    return f"manifest-{part[0]}-of-{part[1]}.json"


def _gathered(corpus: Any, output: Path, parts: int) -> list[dict[str, Any]]:
    """The records of all processes in the order of the corpus, in one manifest."""
    paths = [output / _part_of_manifest((own, parts)) for own in range(1, parts + 1)]
    done = {record["id"]: record for path in paths for record in json.loads(path.read_text())}
    ordered = [done[name] for name in corpus.digests]
    write_text(output / "manifest.json", json.dumps(ordered, indent=1) + "\n")
    for path in paths:
        path.unlink()
    return ordered


def _finished(generator: "Generator", generator_hash: str, folder: Path, digest: str) -> dict[str, Any] | None:
    """The record of a patch that an earlier run wrote. Raises InputError when another text or generator made it."""
    from hyperlora.patch import Patch

    if not folder.exists():
        return None
    patch = Patch.load(folder)
    source = patch.provenance.documents[0]
    same = source["sha256"] == digest
    if not same or patch.provenance.generator_hash != generator_hash:
        what = "text" if not same else "generator"
        raise InputError(f"{folder} was made from another {what}; choose another output or pass --force")
    return _record(folder.name, folder, source["tokens"], patch.nbytes, generator, {})


def _write(
    generator: "Generator",
    documents: Iterable[Document],
    total: int,
    parent: Path,
    name: str | None,
    batch: int,
    force: bool,
) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    bar = tqdm(total=total, unit="document", disable=total < 2 or not sys.stderr.isatty())
    remaining = iter(documents)
    while group := list(islice(remaining, batch)):
        clock: dict[str, float] = {}
        for document in group:
            _check_length(generator, document)
        patches = generator.generate([document.text for document in group], clock)
        for document, patch in zip(group, patches, strict=True):
            seconds = {key: value / len(group) for key, value in clock.items()}
            yield _saved(generator, patch, parent / (name or document.id), document.id, seconds, force)
            bar.update()
    bar.close()


def _together(generator: "Generator", documents: list[Document], output: Path, force: bool) -> dict[str, Any]:
    clock: dict[str, float] = {}
    for document in documents:
        _check_length(generator, document)
    patch = generator.generate_together([document.text for document in documents], clock)
    return _saved(generator, patch, output, output.name, clock, force)


def _saved(
    generator: "Generator", patch: "Patch", folder: Path, name: str, seconds: dict[str, float], force: bool
) -> dict[str, Any]:
    """The record of a patch, which it writes in 16 bits."""
    began = time.perf_counter()
    patch = patch.to(_half(generator))
    patch.save(folder, force)
    tokens = sum(document["tokens"] for document in patch.provenance.documents)
    return _record(name, folder, tokens, patch.nbytes, generator, seconds | {"write": time.perf_counter() - began})


def _check_length(generator: "Generator", document: Document) -> None:
    try:
        generator.encoder.tokenize(document.text)
    except InputError as error:
        raise InputError(f"{document.id + ': ' if document.id else ''}{error}") from error


def _half(generator: "Generator") -> Any:
    """Patches are stored in 16 bits: the base's own dtype, or float16 for a float32 base."""
    import torch

    dtype = generator.base.model.dtype
    return dtype if dtype.itemsize == 2 else torch.float16


def _record(
    name: str, folder: Path, tokens: int, nbytes: int, generator: "Generator", seconds: dict[str, float]
) -> dict[str, Any]:
    base = generator.base
    kv = tokens * base.kv_bytes_per_token
    return {
        "id": name,
        "path": str(folder),
        "tokens": tokens,
        "patch_bytes": nbytes,
        "kv_bytes": kv,
        "base": base.name,
        "seconds": {key: round(value, 4) for key, value in seconds.items()},
    }


def _line(record: dict[str, Any], attention: str) -> str:
    times = ", ".join(f"{key} {value:.2f} s" for key, value in record["seconds"].items()) or "already there"
    return (
        f"{record['path']}: {record['tokens']} tokens read ({attention}); {times}; "
        f"patch {record['patch_bytes'] / 1e6:.2f} MB, the KV cache it replaces {record['kv_bytes'] / 1e6:.2f} MB"
    )
