import json
import subprocess
import sys
from pathlib import Path

import pytest

from hyperlora.methods import METHODS
from hyperlora.patch import Patch
from hyperlora.tasks import TASKS

from .conftest import TEXT, Run, one_line


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "harbour.txt"
    path.write_text(TEXT)
    return path


def test_a_document_becomes_a_patch_that_answers(generate: Run, run: Run, document: Path, tmp_path: Path) -> None:
    code, out, err = generate(document, "-o", tmp_path / "patch")
    assert code == 0, err
    assert "tokens read (sdpa)" in out and "encode" in out and "hypernetwork" in out and "write" in out
    assert "KV cache it replaces" in out
    code, out, err = run("ask", tmp_path / "patch", "-q", "Who?", "-q", "When?", "--compare", "--document", document,
                         "--max-new-tokens", "4", "--json")  # fmt: skip
    assert code == 0, err
    records = json.loads(out)
    assert [record["question"] for record in records] == ["Who?", "When?"]
    assert set(records[0]["answers"]) == {"none", "document", "patch"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")], ids=repr)
def test_want_of_memory_is_one_line_anywhere(
    generate: Run, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hyperlora.generator.Generator.factors", fail)
    code, _, err = generate(document, "-o", tmp_path / "patch")
    assert code == 1 and "out of memory; free some, or take a smaller base" in one_line(err)
    assert not (tmp_path / "patch").exists()


def test_inspect_and_compose(generate: Run, run: Run, document: Path, tmp_path: Path) -> None:
    generate(document, "-o", tmp_path / "one")
    generate("-", "-o", tmp_path / "two", stdin=TEXT[::-1].encode())
    code, out, _ = run("inspect", tmp_path / "one", "--json")
    record = json.loads(out)
    assert code == 0 and record["rank"] == 6 and record["generator"] == "tiny" and record["documents"][0]["tokens"] > 9
    code, out, err = run("compose", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "both", "--weights", "1,0.5")
    assert code == 0 and Patch.load(tmp_path / "both").rank == 12, err
    code, out, err = run("compose", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "b", "--rank", "5", "--json")
    both = Patch.load(tmp_path / "b")
    assert code == 0 and both.rank == 5, err
    assert json.loads(out) == {"path": str(tmp_path / "b"), "patches": 2, "rank": 5, "bytes": both.nbytes}
    options = ("--norm-limit", "0.5")
    code, out, err = run("compose", tmp_path / "one", tmp_path / "two", "-o", tmp_path / "weak", *options)
    assert code == 0 and Patch.load(tmp_path / "weak").rank == 12, err
    code, _, err = run("compose", tmp_path / "one", "-o", tmp_path / "x", "--norm-limit", "-1")
    assert code == 3 and "use a positive number" in one_line(err)
    code, _, err = run("compose", tmp_path / "one", "-o", tmp_path / "x", "--weights", "1,much")
    assert code == 3 and "use numbers" in one_line(err)


def test_json_of_generate(generate: Run, document: Path, tmp_path: Path) -> None:
    code, out, _ = generate(document, "-o", tmp_path / "patch", "--json")
    record = json.loads(out)
    assert code == 0 and record["patch_bytes"] == Patch.load(tmp_path / "patch").nbytes
    assert record["kv_bytes"] == record["tokens"] * 2 * 4 * 2 * 8 * 2  # K and V, layers, kv heads, width, 16 bits


def test_one_patch_of_several_documents(generate: Run, document: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    code, out, err = generate(document, other, "--together", "-o", tmp_path / "both", "--json")
    assert code == 0, err
    record, both = json.loads(out), Patch.load(tmp_path / "both")
    assert record["id"] == "both" and len(both.provenance.documents) == 2 and both.rank == 6
    assert record["tokens"] == sum(source["tokens"] for source in both.provenance.documents)
    assert set(record["seconds"]) == {"encode", "hypernetwork", "write"}
    code, _, err = generate(document, other, "--together", "-o", tmp_path / "both")
    assert code == 3 and "exists" in one_line(err)
    code, _, err = generate(document, other, "--together", "-o", tmp_path / "x", "--shard", "1/2")
    assert code == 3 and "made by one process" in one_line(err)
    other.write_text("a")
    code, _, err = generate(document, other, "--together", "-o", tmp_path / "x")
    assert code == 3 and "other: " in one_line(err) and not (tmp_path / "x").exists()
    code, out, err = generate(document, "--together", "-o", tmp_path / "one", "--json")
    assert code == 0 and len(Patch.load(tmp_path / "one").provenance.documents) == 1, err


BAD_DOCUMENTS = {
    "empty": (b" \n", "is empty"),
    "binary": (b"\x7fELF\x00\x01", "binary file"),
    "latin-1": ("Käse und Brot".encode("latin-1"), "not UTF-8"),
    "one token": (b"a", "at least two"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_documents(generate: Run, tmp_path: Path, name: str) -> None:
    content, message = BAD_DOCUMENTS[name]
    (tmp_path / "bad.txt").write_bytes(content)
    for arguments, stdin in (([tmp_path / "bad.txt"], None), (["-"], content)):
        code, _, err = generate(*arguments, "-o", tmp_path / "patch", stdin=stdin)
        assert code == 3 and message in one_line(err)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"]


def test_outputs_and_generators_that_do_not_fit(
    generate: Run, run: Run, document: Path, tmp_path: Path, tiny_dirs: tuple[str, str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    code, _, err = generate(document, "-o", tmp_path / "there")
    assert code == 3 and "already exists" in one_line(err) and (tmp_path / "there" / "file").read_text() == "mine"
    code, _, err = run("generate", document, "-o", tmp_path / "x", "--generator", tmp_path / "none")
    assert code == 3 and "no generator at" in one_line(err)
    code, _, err = generate(document, "-o", tmp_path / "x", "--base", "no-such-base")
    assert code == 6 and "cannot load base model" in one_line(err)
    code, _, err = generate(document, "-o", tmp_path / "x", "--dtype", "float23")
    assert code == 3 and "did you mean 'float32'" in one_line(err)
    code, _, err = generate(document, "-o", tmp_path / "x", "--shard", "3/2")
    assert code == 3 and "--shard" in one_line(err)
    code, _, err = generate(tmp_path / "missing.txt", "-o", tmp_path / "x")
    assert code == 3 and "cannot read" in one_line(err)
    code, _, err = run("ask", tmp_path / "there", "-q", "Who?")
    assert code == 3 and "not a hyperlora patch" in one_line(err)
    assert not (tmp_path / "x").exists()


def test_patch_for_another_base(generate: Run, run: Run, document: Path, tmp_path: Path) -> None:
    from .conftest import make_base

    other = make_base(seed=3)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    generate(document, "-o", tmp_path / "patch")
    code, _, err = run("ask", tmp_path / "patch", "-q", "Who?", "--base", tmp_path / "other")
    assert code == 4 and "made for base" in one_line(err)


def test_usage_version_and_unknown_recipe(run: Run, tmp_path: Path) -> None:
    assert run("--version")[1].startswith("hyperlora 0.")
    assert run("generate")[0] == 2
    code, out, _ = run("methods", "--json")
    assert code == 0 and set(json.loads(out)) == set(METHODS)
    listed = run("methods")[1]
    assert all(f"{name}: {method.summary()}" in listed.splitlines() for name, method in METHODS.items())
    code, out, _ = run("methods", "distillation")
    assert code == 0 and "hidden_weight: of the squared distance" in out and "    matched = 5" in out
    assert "full:" not in out
    code, out, _ = run("tasks", "--json")
    assert code == 0 and set(json.loads(out)) == set(TASKS)
    assert "    path (required)" in run("tasks", "jsonl")[1].splitlines()
    assert [line.split(":")[0] for line in run("tasks")[1].splitlines() if not line.startswith(" ")] == sorted(TASKS)
    code, _, err = run("tasks", "needle")
    assert code == 3 and "did you mean 'needles'" in one_line(err)
    code, _, err = run("train", tmp_path / "no.yaml", "-o", tmp_path / "run")
    assert code == 3 and "cannot read the recipe" in one_line(err)
    code, _, err = run("evaluate")
    assert code == 3 and "choose one of" in one_line(err)
    for arguments in (
        ("--facts", "2", "--in-prompt"),
        ("--qa", "x", "--new-attributes"),
        ("--facts", "2", "--max-tokens", "9"),
        ("--forgetting", "x", "--conditions", "patch"),
    ):
        code, _, err = run("evaluate", *arguments)
        option = next(argument for argument in arguments[2:] if argument.startswith("--"))
        assert code == 3 and f"{option} says nothing" in one_line(err)
    (tmp_path / "kept.json").write_text("mine")
    code, _, err = run("evaluate", "--facts", "2", "-o", tmp_path / "kept.json")
    assert code == 3 and "already exists" in one_line(err) and (tmp_path / "kept.json").read_text() == "mine"
    code, _, err = run("evaluate", "--facts", "2", "-o", tmp_path)
    assert code == 3 and "is a directory" in one_line(err)


def test_ask_minds_the_window_and_sums_of_many(generate: Run, run: Run, document: Path, tmp_path: Path) -> None:
    assert generate(document, "-o", tmp_path / "p")[0] == 0
    (tmp_path / "long.txt").write_text("word " * 3000)
    asked = ("ask", tmp_path / "p", "-q", "Who?", "--max-new-tokens", "2")
    code, _, err = run(*asked, "--compare", "--document", tmp_path / "long.txt")
    assert code == 3 and "long.txt: " in one_line(err) and "beyond the model's window" in one_line(err)
    code, _, err = run(*asked[:-1], 10**20)
    assert code == 3 and "the question: " in one_line(err)
    code, _, err = run("ask", tmp_path / "p", "-q", "Wer ist M\udcf6ller?")
    assert code == 3 and "not valid UTF-8" in one_line(err)
    code, _, err = run("ask", *[tmp_path / "p"] * 2, *asked[2:])
    assert code == 0 and "warning" not in err, err
    code, _, err = run("ask", *[tmp_path / "p"] * 3, *asked[2:])
    assert code == 0 and "warning: a sum of more than 2 patches loses" in err, err


def test_full_disk_is_one_line_and_leaves_nothing(tiny_dirs: tuple[str, str], document: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        f"sys.argv = ['hyperlora', 'generate', {str(document)!r}, '-o', {str(tmp_path / 'out' / 'patch')!r},"
        f"'--generator', {tiny_dirs[1]!r}]; from hyperlora.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and "cannot write" in one_line(done.stderr)
    assert list((tmp_path / "out").iterdir()) == []
