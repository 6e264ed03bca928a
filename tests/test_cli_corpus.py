"""`hyperlora generate` on many documents: ids, shards, resuming, gzip."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from hyperlora.cli.corpus import Corpus
from hyperlora.errors import InputError
from hyperlora.patch import Patch

from .conftest import TEXT, Run, one_line


def corpus(path: Path, count: int = 5) -> Path:
    lines = [json.dumps({"id": f"doc-{i}", "text": f"{i} {TEXT}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_corpus_resumes_in_shards(generate: Run, tmp_path: Path) -> None:
    source, out = corpus(tmp_path / "docs.jsonl"), tmp_path / "out"
    assert generate(source, "-o", out, "--shard", "1/2")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["doc-0", "doc-2", "doc-4", "manifest-1-of-2.json"]
    before = {p: p.stat().st_mtime_ns for p in out.glob("doc-*/*")}
    code, text, err = generate(source, "-o", out, "--batch", "2")
    assert code == 0 and "already there" in text, err
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    manifest = json.loads((out / "manifest.json").read_text())
    assert [record["id"] for record in manifest] == [f"doc-{i}" for i in range(5)]
    source.write_text(source.read_text().replace("0 The", "zero The"))
    code, _, err = generate(source, "-o", out)
    assert code == 3 and "made from another text" in one_line(err)


def test_folder_of_files(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "a.txt").write_text(TEXT)
    (tmp_path / "docs" / "sub" / "b.md").write_text(TEXT)
    (tmp_path / "docs" / ".git").mkdir()
    (tmp_path / "docs" / ".git" / "index").write_bytes(b"\0")
    (tmp_path / "docs" / "Käse notes.txt").write_text(TEXT)
    assert generate(tmp_path / "docs", "-o", tmp_path / "out")[0] == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a", "sub--b", "Käse_notes", "manifest.json"}
    for inside in ("docs", "docs/sub/patches"):  # where the next call would take patches for documents
        code, _, err = generate(tmp_path / "docs", "-o", tmp_path / inside)
        assert code == 3 and "choose an output outside of it" in one_line(err)
    assert not (tmp_path / "docs" / "sub" / "patches").exists()


def test_files_of_like_names_are_told_apart(generate: Run, tmp_path: Path) -> None:
    for name in (
        "docs/a.txt",
        "docs/a.md",
        "docs/日本.txt",
        "docs/中国.txt",
        "docs/b.bin",
        "x/notes.txt",
        "y/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} {TEXT}")
    (tmp_path / "docs" / "b.bin").write_bytes(b"\0")
    found = Corpus([str(tmp_path / "docs")], "[!b]*.*")
    assert list(found.digests) == ["a.md", "a.txt", "中国", "日本"]
    assert [document.text[:6] for document in found.documents(["a.md", "a.txt"])] == ["docs/a", "docs/a"]
    both = list(Corpus([str(tmp_path / "x" / "notes.txt"), str(tmp_path / "y" / "notes.txt")]).digests)
    assert len(both) == 2 and both[0].endswith("x--notes.txt") and both[1].endswith("y--notes.txt")
    with pytest.raises(InputError, match="two documents are called"):
        Corpus([str(tmp_path / "x" / "notes.txt")] * 2)
    for pattern in ("**.txt", "/x/*"):
        with pytest.raises(InputError, match="use a pattern such as"):
            Corpus([str(tmp_path / "docs")], pattern)
    with pytest.raises(InputError, match="no folder was given"):
        Corpus([str(tmp_path / "x" / "notes.txt")], "*.txt")
    for name in ("manifest.json.txt", "manifesto.txt", "की.txt", "कि.txt", f"{'長' * 80}.txt", "rows.jsonl"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / name).write_text(f"{name} {TEXT}")
    odd = list(Corpus([str(tmp_path / "odd")]).digests)  # a JSONL file in a folder is a text like others
    assert len(odd) == 6 and {"manifest.json-file", "manifesto", "की", "कि", "rows"} < set(odd)
    assert all(len(name.encode()) <= 200 for name in odd)
    code, _, err = generate(tmp_path / "docs", "-o", tmp_path / "out", "--glob", "*.md")
    assert code == 0 and {p.name for p in (tmp_path / "out").iterdir()} == {"a", "manifest.json"}, err


def test_ranks_share_a_corpus(tmp_path: Path, tiny_dirs: tuple[str, str]) -> None:
    """Two processes of torchrun make every patch once; a single patch is refused to them."""
    source, out = corpus(tmp_path / "docs.jsonl", 7), tmp_path / "out"
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hyperlora"]
    rest = ["--generator", tiny_dirs[1], "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [*begin, "generate", *map(str, arguments), *rest]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    done = launched(source, "-o", out)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 7, done.stderr[-2000:]
    assert {p.name for p in out.iterdir()} == {f"doc-{i}" for i in range(7)} | {"manifest.json"}
    assert [record["id"] for record in json.loads((out / "manifest.json").read_text())] == [
        f"doc-{i}" for i in range(7)
    ]
    done = launched(source, "-o", out, "--json")
    assert [record["id"] for record in json.loads(done.stdout)] == [f"doc-{i}" for i in range(7)], done.stderr[-2000:]
    done = launched(source, "--together", "-o", tmp_path / "one")
    assert done.returncode != 0 and "a single patch is made by one process" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "../escape", "text": "some words here"}', "cannot name a directory"),
        ('{"id": "/etc/passwd", "text": "some words here"}', "cannot name a directory"),
        ('{"id": 7.5, "text": "some words here"}', "cannot name a directory"),
        ('{"id": true, "text": "some words here"}', "cannot name a directory"),
        (f'{{"id": "{"x" * 201}", "text": "some words here"}}', "cannot name a directory"),
        ('{"id": "manifest-1-of-2.json", "text": "some words here"}', "cannot name a directory"),
        ('{"id": "doc-1", "text": "some words here"}', "two documents are called"),
        ('{"id": "x"}', "line 3: field 'text' is missing"),
        ('{"id": "x", "text": 5}', "must be a string"),
        ("not json", "line 3: not JSON (Expecting value, column 1)"),
        ("[]", "line 3: not a JSON object"),
    ],
)
def test_bad_corpora(generate: Run, tmp_path: Path, line: str, message: str) -> None:
    source = corpus(tmp_path / "docs.jsonl", 2)
    source.write_text(source.read_text() + line + "\n")
    code, _, err = generate(source, "-o", tmp_path / "out")
    assert code == 3 and message in one_line(err)
    assert not (tmp_path / "out").exists()


def test_corpus_details(generate: Run, tmp_path: Path) -> None:
    source = corpus(tmp_path / "docs.jsonl", 2)
    text = json.dumps({"id": "line", "text": "one\u2028two three"}, ensure_ascii=False)
    source.write_text(source.read_text() + text + "\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    code, _, err = generate(source, "-o", tmp_path / "foreign")
    assert code == 3 and "holds other things (thesis.tex)" in one_line(err)
    assert generate(source, "-o", tmp_path / "out", "--dtype", "float16")[0] == 0
    source.write_text('{"id": "short", "text": "a"}')
    code, _, err = generate(source, "-o", tmp_path / "short")
    assert code == 3 and "short: the document has 1 token" in one_line(err)
    code, _, err = generate("-", "-o", tmp_path / "x", "--shard", "1/2", stdin=b"some words")
    assert code == 3 and "made by one process" in one_line(err)


def gzipped(source: Path) -> Path:
    target = source.with_name(source.name + ".gz")
    target.write_bytes(gzip.compress(source.read_bytes()))
    return target


def test_gzipped_corpus_is_the_same_corpus(generate: Run, tmp_path: Path) -> None:
    source, out = corpus(tmp_path / "docs.jsonl"), tmp_path / "out"
    packed = gzipped(source)
    source.unlink()
    assert generate(packed, "-o", out, "--shard", "2/2")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["doc-1", "doc-3", "manifest-2-of-2.json"]
    code, _, err = generate(corpus(source), "-o", out, "--batch", "2")
    assert code == 0, err
    manifest = json.loads((out / "manifest.json").read_text())
    assert [(record["id"], bool(record["seconds"])) for record in manifest] == [
        (f"doc-{i}", i % 2 == 0) for i in range(5)
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "not a whole gzip file"),
        (lambda data: data[:-8] + b"\0" * 8, "CRC check failed"),
        (lambda data: data[:60] + bytes(255 - byte for byte in data[60:90]) + data[90:], "not a whole gzip file"),
        (lambda data: gzip.decompress(data), "Not a gzipped file"),
        (lambda data: b"", "no documents in"),
        (lambda data: gzip.compress("Käse".encode("latin-1")), "line 1 is not UTF-8"),
        (lambda data: gzip.compress(gzip.decompress(data) + b"\0\n"), "line 31 is binary"),
    ],
)
def test_damaged_gzip(generate: Run, tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    packed = gzipped(corpus(tmp_path / "docs.jsonl", 30))
    packed.write_bytes(damage(packed.read_bytes()))
    code, _, err = generate(packed, "-o", tmp_path / "out")
    assert code == 3 and message in one_line(err) and str(packed) in one_line(err)
    assert not (tmp_path / "out").exists()


def test_corpus_is_streamed(tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl.gz"
    with gzip.open(source, "wt", compresslevel=1) as file:
        for number in range(64):
            file.write(json.dumps({"id": f"doc-{number}", "text": f"{number} " + "word " * 100_000}) + "\n")
    tracemalloc.start()
    found = Corpus([str(source)])
    lengths = [len(document.text) for document in found.documents(found.digests)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(lengths) == 64 and sum(lengths) > 32_000_000
    assert peak < 8_000_000  # a few documents of half a megabyte at once, not all of them


def test_corpus_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source = corpus(tmp_path / "docs.jsonl", 3)
    found = Corpus([str(source)])
    source.write_text(source.read_text().replace("1 The", "one The"))
    read = []
    with pytest.raises(InputError, match=r"'doc-1' changed .* run the command again"):
        for document in found.documents(found.digests):
            read.append(document.id)
    assert read == ["doc-0", "doc-2"]


def test_pipes_are_documents_but_no_corpora(generate: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "docs.jsonl")
    (tmp_path / "a.txt").write_text(TEXT)
    code, _, err = generate(tmp_path / "a.txt", tmp_path / "docs.jsonl", "-o", tmp_path / "out")
    assert code == 3 and "is a pipe" in one_line(err) and not (tmp_path / "out").exists()


def test_killed_process_leaves_whole_patches_only(tiny_dirs: tuple[str, str], tmp_path: Path) -> None:
    source, out = corpus(tmp_path / "docs.jsonl", 400), tmp_path / "out"
    command = [sys.executable, "-m", "hyperlora", "generate", str(source), "-o", str(out), "--generator", tiny_dirs[1]]
    process = subprocess.Popen([*command, "--batch", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and len(list(out.glob("doc-*"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = list(out.glob("doc-*"))
    assert 3 <= len(finished) < 400
    for folder in finished:
        assert Patch.load(folder).rank == 6
