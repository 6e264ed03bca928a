import gzip
import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item
from hyperlora.data.rows import asked_of_context
from hyperlora.errors import InputError
from hyperlora.evaluation.items import needle_items, qa_items
from hyperlora.tasks import TASKS, Task, read_task

from .conftest import make_base

Specs = dict[str, dict[str, Any]]
WORDS = ["the", "ferry", "keeper", "and", "parrot", "sells", "rye", "bread", "harbour", "late", "when", "trees", "lake"]
NEEDLE = re.compile(r"(It is known that|In the case of|The register gives) ")


def story(seed: int, sentences: int) -> str:
    rng = random.Random(seed)
    ends = (". ", ".\n", "! ", '." ', ", said Mr. Brown. ")
    return "".join(
        " ".join(rng.choices(WORDS, k=rng.randint(4, 14))).capitalize() + rng.choice(ends) for _ in range(sentences)
    )


def write_lines(path: Path, rows: list[Any]) -> str:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return make_base()


@pytest.fixture
def books(tmp_path: Path) -> str:
    return write_lines(tmp_path / "books.jsonl", [{"id": f"book{n}", "text": story(n, 250)} for n in range(2)])


@pytest.fixture
def specs(tmp_path: Path, books: str, monkeypatch: pytest.MonkeyPatch) -> Specs:
    """A small version of every task that has more documents than the tests ask for."""
    contexts = [f"{story(n, 2)}The number is {n}." for n in range(12)]
    asked = [{"question": q, "answers": [str(n), f"number {n}"]} for n in range(12) for q in ("Which number?", "What?")]
    pairs = [(context, asked[2 * n : 2 * n + 2]) for n, context in enumerate(contexts)]
    squad = [{"id": f"s{n}", "context": c, "qas": qas} for n, (c, qas) in enumerate(pairs)]
    own = [{"context": c, "questions": qas} for c, qas in pairs]
    dolly = [{"instruction": "Which number?", "input": c, "output": str(n)} for n, c in enumerate(contexts)]
    write_lines(tmp_path / "dolly_3k.jsonl.gz", dolly)
    monkeypatch.setenv("HYPERLORA_DATA", str(tmp_path))
    return {
        "qa": {"source": write_lines(tmp_path / "qa.jsonl", squad)},
        "facts": {},
        "needles": {"source": books, "lengths": [200], "depths": [0, 0.6]},
        "language_modelling": {"source": books, "tokens": 60, "following": 20},
        "instructions": {},
        "long_documents": {"source": books, "tokens": 400, "facts": 3},
        "jsonl": {"path": write_lines(tmp_path / "own.jsonl.gz", own)},
    }


def tokens(base: BaseModel, text: str) -> int:
    return len(base.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", TASKS)
def test_contract(name: str, specs: Specs, base: BaseModel) -> None:
    def loaded(**settings: Any) -> list[Item]:
        return read_task({"task": name, **specs[name], **settings}, "test").load(base)

    task, items = TASKS[name], loaded(items=8)
    assert items == loaded(items=8)
    assert items[:4] == loaded(items=4)
    assert items != loaded(items=8, seed=1)
    assert len(items) == 8 == len({item.id for item in items})
    assert all(item.text.strip() for item in items)
    assert task.name == name and task.metrics
    for item in items:
        if task.kind == "text":
            assert item.following.strip() and not item.questions
        else:
            assert item.questions and not item.following
        for question in item.questions:
            assert question.text and question.reply in question.accepted and all(question.accepted)


def test_questions_about_documents_are_those_of_evaluation(specs: Specs, base: BaseModel) -> None:
    source = specs["qa"]["source"]
    limit = sorted(tokens(base, item.text) for item in qa_items(source, base, 10_000))[6]
    found = read_task({"task": "qa", "source": source, "max_tokens": limit}, "test").load(base)
    assert 7 <= len(found) < 12 and found == qa_items(source, base, limit)
    two = read_task({"task": "qa", "source": source, "questions": 2, "max_tokens": 10_000}, "test").load(base)
    assert len(two) == 12 and all(len(item.questions) == 2 for item in two)
    with pytest.raises(InputError, match=r"qa has no documents.* at most 2 tokens"):
        read_task({"task": "qa", "source": source, "max_tokens": 2}, "test").load(base)


def test_needles_are_evaluated_at_every_length_and_depth(
    base: BaseModel, books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERLORA_DATA", str(Path(books).parent))
    write_lines(
        Path(books).parent / "gutenberg_books.jsonl.gz",
        [json.loads(line) for line in Path(books).read_text().splitlines()],
    )
    items = needle_items(base, [200, 300], 20)
    cells = [(item.tags["length"], item.tags["depth"]) for item in items]
    assert sorted(cells) == sorted(2 * [(length, depth / 4) for length in (200, 300) for depth in range(5)])
    assert all(abs(tokens(base, item.text) - item.tags["length"]) < 16 for item in items)
    counts = Counter((item.tags["length"], item.tags["depth"]) for item in needle_items(base, [200, 210, 220]))
    assert len(counts) == 15 and set(counts.values()) == {33}  # as many as fit into 500


def halves(item: Item, value: str) -> tuple[str, str, str]:
    """What stands before the only hidden sentence, the sentence and what stands after it."""
    found = NEEDLE.search(item.text)
    assert found
    end = item.text.index(value, found.start()) + len(value) + 1
    return item.text[: found.start()], item.text[found.start() : end], item.text[end:]


def test_needle_stands_where_and_in_what_it_should(books: str, base: BaseModel) -> None:
    lengths, depths = [200, 333], [0, 0.3, 0.5, 1]
    spec = {"task": "needles", "source": books, "items": 24, "lengths": lengths, "depths": depths}
    items = read_task(spec, "test").load(base)
    texts = [json.loads(line)["text"] for line in Path(books).read_text().splitlines()]
    assert Counter((i.tags["length"], i.tags["depth"]) for i in items) == {(n, d): 3 for n in lengths for d in depths}
    for item in items:
        reply, value = item.questions[0].accepted
        before, needle, after = halves(item, value)
        assert needle.endswith(f"{value}.") and reply.partition("'s ")[0] in needle
        assert any((before + after[1:]).strip() in text for text in texts)  # nothing else was changed
        assert not before.strip() or re.search(r'[.!]"?\s+$', before)
        assert item.text.lower().count(value.lower()) == 1
        length, depth = float(item.tags["length"]), float(item.tags["depth"])
        assert abs(tokens(base, item.text) - length) <= 2
        share = tokens(base, before) / max(1, tokens(base, before) + tokens(base, after))
        assert abs(share - depth) < 0.03


def test_needle_says_what_the_book_does_not(books: str, base: BaseModel) -> None:
    spec = {"task": "needles", "source": books, "items": 10, "lengths": [200]}
    values = {item.questions[0].accepted[1] for item in read_task(spec, "test").load(base)}
    rows = [json.loads(line) for line in Path(books).read_text().splitlines()]
    known = " ".join(f"He said {value.upper()}." for value in sorted(values))
    write_lines(Path(books), [{**row, "text": f"{row['text']} {known}"} for row in rows])
    again = {item.questions[0].accepted[1] for item in read_task(spec, "test").load(base)}
    assert len(again) > 5 and not again & values


def test_long_document_spreads_its_facts(books: str, base: BaseModel) -> None:
    spec = {"task": "long_documents", "source": books, "tokens": 1200, "facts": 5, "items": 6}
    for item in read_task(spec, "test").load(base):
        assert abs(tokens(base, item.text) - 1200) <= 1 and item.tags == {"length": 1200}
        assert len(item.questions) == 5
        for part, question in enumerate(item.questions):
            value = question.accepted[1]
            assert item.text.count(value) == 1
            assert part / 5 < item.text.index(value) / len(item.text) < (part + 1) / 5
        assert len(NEEDLE.findall(item.text)) == 5
    with pytest.raises(InputError, match="60 facts fill 1200 tokens"):
        read_task({**spec, "facts": 60}, "test").load(base)


@pytest.mark.parametrize("name", ["needles", "long_documents", "language_modelling"])
def test_texts_that_are_too_short_are_refused(name: str, books: str, base: BaseModel) -> None:
    setting = {"lengths": [90_000]} if name == "needles" else {"tokens": 90_000}
    with pytest.raises(InputError, match=f"the task {name} has no documents: .*tokens; use ") as caught:
        read_task({"task": name, "source": books, **setting}, "test").load(base)
    assert books in str(caught.value)


def test_text_is_followed_by_what_follows_it(books: str, base: BaseModel) -> None:
    spec = {"task": "language_modelling", "source": books, "tokens": 90, "following": 30}
    items = read_task(spec, "test").load(base)
    texts = {row["id"]: row["text"] for row in map(json.loads, Path(books).read_text().splitlines())}
    used: dict[str, list[tuple[int, int]]] = {name: [] for name in texts}
    for item in items:
        assert abs(tokens(base, item.text) - 90) <= 1 and abs(tokens(base, item.following) - 30) <= 1
        name = item.id.partition("@")[0]
        start = texts[name].index(item.text + item.following)
        used[name].append((start, start + len(item.text + item.following)))
    for spans in map(sorted, used.values()):
        assert len(spans) > 20 and all(a[1] <= b[0] for a, b in pairwise(spans))


def test_instructions_about_contexts_and_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: BaseModel
) -> None:
    monkeypatch.setenv("HYPERLORA_DATA", str(tmp_path))
    rows = [{"instruction": "Sum it up.", "input": text, "output": "Bread."} for text in ("Maro sells bread.", " ")]
    write_lines(tmp_path / "dolly_3k.jsonl.gz", rows)
    write_lines(tmp_path / "alpaca_plus_validation_unseen.jsonl.gz", rows)
    loaded = {
        s: read_task({"task": "instructions", "source": s}, "test").load(base) for s in ("dolly", "alpaca_unseen")
    }
    assert [(i.text, i.questions[0].text) for i in loaded["dolly"]] == [("Maro sells bread.", "Sum it up.")]
    assert [(i.text, i.questions[0].text) for i in loaded["alpaca_unseen"]] == [("Sum it up.", "Maro sells bread.")]
    assert loaded["dolly"][0].questions[0].accepted == ("Bread.",)
    hub = {"instruction": "Sum it up.", "context": "Maro sells bread.", "response": "Bread.", "category": "qa"}
    assert asked_of_context(hub, loaded["dolly"][0].id) == loaded["dolly"][0]
    write_lines(tmp_path / "dolly_3k.jsonl.gz", rows[1:])
    with pytest.raises(InputError, match="no row of dolly has a document and a question"):
        read_task({"task": "instructions"}, "test").load(base)
    write_lines(tmp_path / "dolly_3k.jsonl.gz", [{"instruction": "Sum it up.", "input": "Maro"}])
    with pytest.raises(InputError, match="line 1: field 'output' is missing"):
        read_task({"task": "instructions"}, "test").load(base)


def own(path: Path, base: BaseModel, **settings: Any) -> list[Item]:
    return read_task({"task": "jsonl", "path": str(path), **settings}, "test").load(base)


def test_jsonl_takes_one_question_or_many(tmp_path: Path, base: BaseModel) -> None:
    one = {"context": "Maro sells bread.", "question": "What?", "answers": ["rye bread", "bread"]}
    many = {"id": 70, "context": "Two.", "questions": [{"question": q, "answers": ["x"]} for q in ("Who?", "Where?")]}
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(one)}\n\n{json.dumps(many)}\n", encoding="utf-8-sig")
    items = {item.id: item for item in own(tmp_path / "own.jsonl", base)}
    assert set(items) == {"1", "70"} and items["1"].text == "Maro sells bread."
    assert items["1"].questions[0].accepted == ("rye bread", "bread") and items["1"].questions[0].reply == "bread"
    assert [question.text for question in items["70"].questions] == ["Who?", "Where?"]


GOOD = '{"context": "Maro sells bread.", "question": "What?", "answers": ["bread"]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "What?", "answers": ["bread"]}', "line 2: the key 'context' is missing"),
        ('{"context": "Maro"}', "line 2: the key 'question' is missing"),
        ('{"context": "Maro", "question": "What?"}', "line 2: the key 'answers' is missing"),
        ('{"context": "x", "questions": [{"question": "?"}]}', "line 2: the key 'questions.0.answers' is missing"),
        ('{"context": "x", "questions": []}', "line 2: questions: List should have at least 1 item"),
        (
            '{"context": 7, "question": "?", "answers": ["x"]}',
            "line 2: context: Input should be a valid string (got 7)",
        ),
        (
            '{"context": "x", "question": "?", "answers": "x"}',
            "line 2: answers: Input should be a valid list (got 'x')",
        ),
        ('{"context": "x", "question": "?", "answers": []}', "line 2: answers: List should have at least 1 item"),
        ('{"context": " ", "question": "?", "answers": ["x"]}', "line 2: context: must not be empty (got ' ')"),
        (
            '{"context": "\\ud800", "question": "?", "answers": ["x"]}',
            "line 2: context: must not hold half a surrogate pair",
        ),
        (
            '{"id": ["a"], "context": "x", "question": "?", "answers": ["x"]}',
            "line 2: id: Input should be a valid string",
        ),
        ('{"id": "1", "context": "x", "question": "?", "answers": ["x"]}', "line 2: the id '1' is that of line 1"),
        ('{"context": ', "line 2: not JSON (Expecting value, column 12)"),
        ("[]", "line 2: expected a JSON object, not list"),
        ('{"id": ' + "1" * 5000, "line 2: a whole number has too many digits to be read"),
    ],
)
def test_jsonl_errors_name_line_and_field(tmp_path: Path, base: BaseModel, line: str, message: str) -> None:
    (tmp_path / "own.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(InputError, match=r"own\.jsonl, ") as caught:
        own(tmp_path / "own.jsonl", base)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_jsonl_that_cannot_be_read(tmp_path: Path, base: BaseModel) -> None:
    path = tmp_path / "own.jsonl"
    with pytest.raises(InputError, match=r"cannot read .*own\.jsonl"):
        own(path, base)
    path.write_text("\n")
    with pytest.raises(InputError, match=r"own\.jsonl is empty"):
        own(path, base)
    path.write_bytes(f"{GOOD}\n".encode() + GOOD.replace("Maro", "Käse").encode("latin-1"))
    with pytest.raises(InputError, match=r"own\.jsonl, line 2 is not UTF-8"):
        own(path, base)


def test_two_documents_of_one_id_are_refused(tmp_path: Path, base: BaseModel) -> None:
    row = {"id": "a", "context": "Maro bakes.", "qas": [{"question": "Who?", "answers": ["Maro"]}]}
    source = write_lines(tmp_path / "qa.jsonl", [row, row])
    with pytest.raises(InputError, match="two documents of the task qa are called 'a'"):
        read_task({"task": "qa", "source": source}, "test").load(base)


HALF = "half \ud83d of it"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("qa", {"context": f"Maro sells {HALF}.", "qas": [{"question": "What?", "answers": ["rye"]}]}),
        ("qa", {"context": "Maro sells rye.", "qas": [{"question": f"What {HALF}?", "answers": ["rye"]}]}),
        ("qa", {"context": "Maro sells rye.", "qas": [{"question": "What?", "answers": ["rye", HALF]}]}),
        ("qa", {"id": HALF, "context": "Maro sells rye.", "qas": [{"question": "What?", "answers": ["rye"]}]}),
        ("language_modelling", {"text": HALF}),
        ("needles", {"text": HALF}),
        ("long_documents", {"text": HALF}),
    ],
)
def test_half_a_character_is_named_with_its_line(tmp_path: Path, base: BaseModel, name: str, row: Any) -> None:
    good = {"context": "Maro bakes.", "qas": [{"question": "Who?", "answers": ["Maro"]}]}
    source = write_lines(tmp_path / "source.jsonl", [good, row])
    with pytest.raises(InputError, match=r"source\.jsonl, line 2: half a surrogate pair") as caught:
        read_task({"task": name, "source": source}, "test").load(base)
    assert str(caught.value).isascii() and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"task": "needels"}, "test: unknown task 'needels'; did you mean 'needles'?"),
        ({"task": ["qa"]}, "test: unknown task \"['qa']\"; "),
        ({"items": 3}, "test: expected keys and values, among them 'task' (qa, facts, "),
        ("qa", "test: expected keys and values"),
        ({"task": "facts", "fact": 3}, "test: unknown key 'fact'; did you mean 'facts'"),
        ({"task": "qa"}, "test: the key 'source' is missing"),
        ({"task": "facts", "items": 0}, "test: items: Input should be greater than 0 (got 0)"),
        (
            {"task": "needles", "depths": [0.5, 1.5]},
            "test: depths.1: Input should be less than or equal to 1 (got 1.5)",
        ),
        ({"task": "needles", "lengths": []}, "test: lengths: List should have at least 1 item"),
        (
            {"task": "needles", "items": 40},
            "test: 40 items cannot fill 15 pairs of length and depth evenly; take 30 or 45",
        ),
        ({"task": "needles", "items": 7}, "test: 7 items cannot fill 15 pairs of length and depth evenly; take 15"),
        ({"task": "instructions", "source": "alpaca"}, "test: source: Input should be 'dolly', 'alpaca_seen'"),
    ],
)
def test_wrong_settings_are_named(spec: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_task(spec, "test")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_settings_reach_the_task() -> None:
    task = read_task({"task": "instructions", "source": "alpaca_seen", "items": 7, "max_new_tokens": 9}, "test")
    assert isinstance(task, Task) and (task.items, task.seed, task.max_new_tokens) == (7, 0, 9)
