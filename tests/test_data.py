import gzip
import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from hyperlora.data.facts import ATTRIBUTES, NEW_ATTRIBUTES, RESERVED, fact_document
from hyperlora.data.items import Item
from hyperlora.data.made_questions import ask_about
from hyperlora.data.mix import Mix
from hyperlora.data.open_words import OpenWords
from hyperlora.data.overlap import overlapping
from hyperlora.data.rows import FEW_WORDS, asked_yes_or_no
from hyperlora.data.sources import load
from hyperlora.errors import InputError
from hyperlora.recipe import FactsTask, MadeTask, QATask, TextTask

from .conftest import make_tokenizer


def test_facts_are_disjoint_between_splits_and_rich_enough() -> None:
    assert len(ATTRIBUTES) >= 150 and not ATTRIBUTES.keys() & NEW_ATTRIBUTES.keys()
    for halves in (*ATTRIBUTES.values(), *NEW_ATTRIBUTES.values()):
        train, test = set(halves["train"]), set(halves["test"])
        assert not train & test and min(len(train), len(test)) >= 200
    documents = {split: [fact_document(str(i), 8, split) for i in range(200)] for split in ("train", "test")}  # type: ignore[arg-type]
    names = {s: {w for d in ds for w in d.text.split() if w.endswith("'s")} for s, ds in documents.items()}
    assert not names["train"] & names["test"]
    assert not {q.text for d in documents["train"] for q in d.questions} & {
        q.text for d in documents["test"] for q in d.questions
    }


def test_every_fact_is_asked_and_stands_in_the_document() -> None:
    item = fact_document("x", 8, "test", new_attributes=True)
    assert item == fact_document("x", 8, "test", new_attributes=True)
    assert len(item.questions) == 8 and len({q.reply for q in item.questions}) == 8
    for question in item.questions:
        reply, value = question.accepted
        assert value in item.text and value in reply and value not in question.text


def test_documents_to_train_on_share_kinds_among_their_facts() -> None:
    documents = [fact_document(str(i), 8, "train") for i in range(200)]
    kinds = [len({q.reply.split("'s ", 1)[1].split(" is ")[0] for q in d.questions}) for d in documents]
    assert all(len({q.reply for q in d.questions}) == 8 for d in documents)
    assert min(kinds) == 2 and max(kinds) > 5 and 40 < sum(kind < 4 for kind in kinds) < 120
    assert len(fact_document("x", 400, "train").questions) == 400


def test_half_of_the_facts_take_their_words_from_text() -> None:
    text = "of Harbour masters, who never sleep, keep seven hobby lanterns burning in Striped Ferret lanes"
    words = OpenWords([Item("a", "of it is"), Item("b", text)], RESERVED | {"striped ferret"})
    items = [fact_document(str(i), 4, "train", words=words) for i in range(40)]
    assert items[0] == fact_document("0", 4, "train", words=words)
    facts = [
        question.reply.rstrip(".").split("'s ", 1)[1].split(" is ") for item in items for question in item.questions
    ]
    assert 0.35 < sum(kind in ATTRIBUTES for kind, _ in facts) / len(facts) < 0.65
    taken = {fact for fact in map(tuple, facts) if fact[0] not in ATTRIBUTES}
    assert len(taken) > 20 and all(kind == kind.lower() and kind in text.lower() for kind, _ in taken)
    assert all(value in text and "hobby" not in value and "Striped Ferret" not in value for _, value in taken)
    assert not {word for fact in taken for phrase in fact for word in phrase.split()} & {"of", "who", "sleep,", "lane."}
    for useless in ("of it is", "hobby, village of village"):
        with pytest.raises(InputError, match="hold none"):
            OpenWords([Item("a", useless)], RESERVED)


def test_sources_read_jsonl_text_and_gzip(tmp_path: Path) -> None:
    record = {"id": "a", "context": "Maro bakes.", "qas": [{"question": "Who?", "answers": ["Maro the baker", "Maro"]}]}
    with gzip.open(tmp_path / "qa.jsonl.gz", "wt") as file:
        file.write(json.dumps(record) + "\n\n")
    (item,) = load(str(tmp_path / "qa.jsonl.gz"))
    assert item.questions[0].reply == "Maro" and len(item.questions[0].accepted) == 2
    (tmp_path / "wiki.txt").write_text(" = One = \n\nfirst\n = = Part = = \nmore\n = Two = \nsecond\n")
    assert [i.text.split("\n")[0] for i in load(str(tmp_path / "wiki.txt"))] == ["= One =", "= Two ="]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "line 1: the document must be a string"),
        ('{"context": "x", "qas": [{"question": "?"}]}', "line 1: field 'answers' is missing"),
        ('{"context": "x", "qas": [{"question": "?", "answers": []}]}', "has no answer"),
        ('{"context": "x", "qas": [{"question": 3, "answers": ["y"]}]}', "question must be a string, not int"),
        ('{"context": "x", "qas": ["y"]}', "qas must be a list of JSON objects"),
        ("{", "line 1: not JSON (Expecting property name"),
        ("[]", "line 1: expected a JSON object, not list"),
        (
            '{"context": " ", "qas": [{"question": "?", "answers": ["y"]}]}',
            "line 1: the context is empty, but questions are asked about it",
        ),
        ('{"text": "half \\ud83d"}', "line 1: half a surrogate pair, such as \\ud83d alone"),
        ('{"text": "x", "size": ' + "7" * 5000 + "}", "line 1: a whole number has too many digits"),
        ("[" * 100_000, "line 1: lists or objects are nested too deeply"),
    ],
)
def test_malformed_data_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"bad\.jsonl") as caught:
        load(str(tmp_path / "bad.jsonl"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_line_of_another_encoding_is_named_however_far_down(tmp_path: Path) -> None:
    good = json.dumps({"text": "Käse und Brot"}, ensure_ascii=False)
    (tmp_path / "bad.jsonl").write_bytes("\n".join([good] * 700).encode() + b"\n" + good.encode("latin-1"))
    with pytest.raises(InputError, match=r"bad\.jsonl, line 701 is not UTF-8"):
        load(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bom.jsonl").write_text(good, encoding="utf-8-sig")
    assert load(str(tmp_path / "bom.jsonl"))[0].text == "Käse und Brot"


def test_unknown_and_missing_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'squad_dev'"):
        load("squad_dve")
    monkeypatch.setenv("HYPERLORA_DATA", str(tmp_path))
    with pytest.raises(InputError, match="set HYPERLORA_DATA"):
        load("squad_dev")


def test_mix_reshuffles_by_epoch_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    lines = [{"id": str(i), "context": f"text {i}", "qas": [{"question": "?", "answers": ["x"]}]} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, lines)))
    task = QATask(task="qa", sources=[str(path)])
    mix = Mix([task], 0, make_tokenizer())
    epochs = [[mix.draw()[0].id for _ in range(10)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert all(a != b for a, b in combinations(epochs, 2))
    again = Mix([task], 0, make_tokenizer())
    again.state = [13]
    assert again.draw()[0].id == epochs[1][3]


def test_languages_without_spaces_are_drawn_and_cut(tmp_path: Path) -> None:
    """From anywhere in the text, as long as was asked for; what follows does follow."""
    text = "".join(chr(0x4E00 + number % 2000) for number in range(3000))
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": found}, ensure_ascii=False) + "\n" for found in (text, "一", "word")))
    mix = Mix([TextTask(task="text", sources=[str(path)], tokens=(24, 24), following=12)], 0, make_tokenizer())
    drawn = [mix.draw()[0] for _ in range(8)]
    assert len({item.text for item in drawn}) == 8
    for item in drawn:
        own, after = (found.strip("\ufffd") for found in (item.text, item.following))  # bytes of half a character
        assert 6 <= len(own) <= 8 and own in text and after in text
        assert 0 < text.index(after) - text.index(own) - len(own) + 1 <= 3


def test_mix_keeps_its_weights() -> None:
    tasks = [FactsTask(task="facts", weight=3, facts=(2, 2)), FactsTask(task="facts", weight=1, facts=(5, 5))]
    mix = Mix(list(tasks), 0, make_tokenizer())
    for _ in range(400):
        mix.draw()
    assert 0.7 < mix.state[0] / 400 < 0.8


def test_facts_stand_between_the_sentences_of_a_haystack(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "One two three four. Five six seven eight. Nine ten. " * 20}))
    task = FactsTask(task="facts", facts=(1, 1), haystack=[str(path)], tokens=(20, 40))
    mix = Mix([task], 0, make_tokenizer())
    items = [mix.draw()[0] for _ in range(20)]
    for item in items:
        before, value, after = item.text.partition(item.questions[0].accepted[1])
        assert value and len(before.split() + after.split()) > 10
        assert "  " not in item.text  # nothing but what it says tells a fact from the rest
    assert len({item.text.index(item.questions[0].accepted[1]) // 20 for item in items}) > 2
    assert [item.text for item in mix.documents()] == [load(str(path))[0].text]


@pytest.mark.parametrize(
    ("sentence", "asked", "answer"),
    [
        (
            "Maria Bell opened the old mill behind the church.",
            "Who or what opened the old mill behind the church?",
            "Maria Bell",
        ),
        (
            "The mill was sold in 1902, with all its grain.",
            '"The mill was sold, with all its grain": in which year?',
            "1902",
        ),
        (
            "Mr. Bell and J. Cole never said who opened the mill in 1902.",
            '"Mr. Bell and J. Cole never said who opened the mill": in which year?',
            "1902",
        ),
        (
            "The mill was moved slowly to a hill near New Brook.",
            '"The mill was moved slowly to a hill": where?',
            "New Brook",
        ),
        (
            "There were 14 windows behind the old mill.",
            'How many, or which number: "There were ... windows behind the old mill"?',
            "14",
        ),
    ],
)
def test_rules_leave_the_answer_out_of_the_sentence(sentence: str, asked: str, answer: str) -> None:
    made = {q.text: q.reply for seed in range(40) for q in ask_about(sentence, random.Random(seed), 3)}
    assert made.pop(asked + FEW_WORDS) == answer
    for question, left_out in made.items():  # the rest of them are gaps
        quoted = question.removeprefix('Which words are missing? "').removesuffix('"' + FEW_WORDS)
        assert quoted.replace("____", left_out) == sentence and 1 <= len(left_out.split()) <= 4


def test_nobody_and_no_month_is_asked_for_and_short_sentences_are_not_asked_about() -> None:
    text = (
        "The mayor opened it slowly in May, behind the church. Too short. She opened the old mill near the church. "
        "Who opened the old mill behind the church? When they opened it in Latin, 1 @,@ 500 people came"
    )
    made = [q.text for seed in range(40) for q in ask_about(text, random.Random(seed), 5)]
    assert made and all(question.startswith("Which words are missing?") for question in made)
    assert max(len(ask_about(text, random.Random(seed), 5)) for seed in range(5)) == 2


def test_made_questions_are_about_the_piece_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "Maria Bell opened the old mill behind the church in 1902. " * 20}))
    mix = Mix([MadeTask(task="made", sources=[str(path)], tokens=(120, 160), questions=2)], 0, make_tokenizer())
    items = [mix.draw()[0] for _ in range(10)]
    assert all(1 <= len(item.questions) <= 2 for item in items)
    assert all(question.reply in item.text for item in items for question in item.questions)
    assert [item.text for item in mix.documents()] == [load(str(path))[0].text]


def test_yes_or_no_questions_of_files_and_of_the_hub() -> None:
    hub = {"passage": "The mill burned.", "question": "did the mill burn", "answer": True}
    file = {"id": "x", "context": "The mill burned.", "qas": [{"question": "did the mill burn", "answers": ["yes"]}]}
    assert asked_yes_or_no(hub, "x") == asked_yes_or_no(file, "y")


def test_overlap_finds_repeated_documents_only() -> None:
    text = " ".join(f"word{i}" for i in range(60))
    train = [Item("train-1", "some other text " + text), Item("train-2", "nothing of it")]
    test = [Item("same", text), Item("new", " ".join(f"other{i}" for i in range(60))), Item("short", "too short")]
    assert overlapping(train, test) == [("same", "train-1")]
