"""The base's own answers as targets: how they are made, found again and learned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from hyperlora.base_model import BaseModel, load_base
from hyperlora.data import teacher
from hyperlora.data.items import Item, Question
from hyperlora.data.sources import load
from hyperlora.data.teacher import Taught, TeacherCorpus, teach
from hyperlora.errors import InputError
from hyperlora.objectives import Row, collate, cross_entropy, label_logits, reply_loss, state_distance, state_spread
from hyperlora.recipe import Recipe
from hyperlora.student import Student

from .conftest import TEXT, Run, make_base, one_line
from .test_training import trainer

LINES = TEXT.strip().splitlines()


@pytest.fixture
def items() -> list[Item]:
    return [
        Item(str(n), f"{line} Note {n}.", tuple(Question(f"What is {k} of {n}?", "Maro", ("Maro",)) for k in range(2)))
        for n, line in enumerate(LINES * 2)
    ]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "_PART_DOCUMENTS", 3)


def test_what_is_taught_is_what_the_model_says_with_the_document(
    base: BaseModel, items: list[Item], tmp_path: Path
) -> None:
    assert teach(base, items, tmp_path / "t", top_k=5, max_new_tokens=6, phrased=False) == 3
    corpus = TeacherCorpus(tmp_path / "t", base)
    assert len(corpus) == 16 and corpus.find(items[0].text, "Who?") is None
    item = items[3]
    for question in item.questions:
        found = corpus.find(item.text, question.text)
        assert found is not None
        log_probs = []
        for context in (item.text, None):
            ids = base.prompt.prompt_ids(base.tokenizer, question.text, context)
            with torch.no_grad():
                logits = base.model(torch.tensor([ids + found.reply])).logits[0, len(ids) - 1 : -1]
            log_probs.append(logits.log_softmax(-1))
        values, top = log_probs[0].topk(5)
        assert top[:, 0].tolist() == found.reply  # greedy
        torch.testing.assert_close(found.top_ids[:, 0], top[:, 0])
        torch.testing.assert_close(found.top_log_probs, values, rtol=2e-3, atol=2e-3)  # in 16 bits
        own = [x.gather(1, torch.tensor(found.reply)[:, None]).squeeze(1) for x in log_probs]
        torch.testing.assert_close(found.gain, own[0] - own[1], rtol=5e-3, atol=5e-3)


def test_a_phrased_reply_says_the_answer_or_is_the_greedy_one(
    base: BaseModel, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(base, items[:3], tmp_path / "greedy", max_new_tokens=6, phrased=False)
    teach(base, items[:3], tmp_path / "wrong", max_new_tokens=6)
    monkeypatch.setattr(teacher, "contains", lambda *_: 1.0)
    teach(base, items[:3], tmp_path / "right", max_new_tokens=6)
    greedy, wrong, right = (TeacherCorpus(tmp_path / name, base)._held for name in ("greedy", "wrong", "right"))
    assert [one.reply for one in greedy.values()] == [one.reply for one in wrong.values()]
    assert [one.reply for one in greedy.values()] != [one.reply for one in right.values()]


def test_shares_and_stopped_runs_add_up(base: BaseModel, items: list[Item], tmp_path: Path) -> None:
    made = [teach(base, items, tmp_path / "t", shard, max_new_tokens=4) for shard in ((2, 2), (1, 2))]
    assert made == [1, 2] and teach(base, items, tmp_path / "t", max_new_tokens=4) == 0
    (tmp_path / "t" / "part-000001.safetensors").unlink()
    (tmp_path / "t" / ".part-000001.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="holds 2 of 3 files"):
        TeacherCorpus(tmp_path / "t", base)
    assert teach(base, items, tmp_path / "t", max_new_tokens=4) == 1 and len(TeacherCorpus(tmp_path / "t", base)) == 16


def test_a_full_disk_is_said_and_leaves_no_half_file(
    base: BaseModel, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(teacher, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on device.*; free some space"):
        teach(base, items, tmp_path / "t", max_new_tokens=4)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["teacher.json"]
    monkeypatch.setattr(teacher, "save_file", save_file)
    assert teach(base, items, tmp_path / "t", max_new_tokens=4) == 3


def test_folders_of_something_else_are_refused(base: BaseModel, items: list[Item], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no teacher's replies; make them"):
        TeacherCorpus(tmp_path / "none", base)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "teacher.json").write_text('{"some": "settings"}')
    with pytest.raises(InputError, match="no teacher's replies; make them"):
        TeacherCorpus(tmp_path / "json", base)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".teacher.json-x1").write_text("{")  # a process was killed just then
    teach(base, items[:1], tmp_path / "begun", max_new_tokens=4)
    with pytest.raises(InputError, match="has only"):
        teach(base, items, tmp_path / "many", top_k=100000)
    with pytest.raises(InputError, match="no questions"):
        teach(base, [Item("a", "Text.")], tmp_path / "t")
    teach(base, items, tmp_path / "t", max_new_tokens=4)
    with pytest.raises(InputError, match="another top_k"):
        teach(base, items, tmp_path / "t", top_k=3, max_new_tokens=4)
    with pytest.raises(InputError, match="not of"):
        TeacherCorpus(tmp_path / "t", make_base(seed=5))
    half = make_base()
    half.model.half()
    assert half.fingerprint != base.fingerprint and len(TeacherCorpus(tmp_path / "t", half)) == 16
    asked = [Item(item.id, item.text, (Question("Whose?", "Ours", ("Ours",)),)) for item in items]
    with pytest.raises(InputError, match="another documents"):
        teach(base, asked, tmp_path / "t", max_new_tokens=4)
    (tmp_path / "t" / "part-000001.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="is damaged"):
        TeacherCorpus(tmp_path / "t", base)


def test_a_document_beyond_the_window_is_said_before_the_first_reply(
    base: BaseModel, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Item("long", "word " * 2000, items[0].questions)
    with pytest.raises(InputError, match=r"teach, document long: .* beyond the model's window"):
        teach(base, [*items, long], tmp_path / "t", max_new_tokens=4)
    assert not (tmp_path / "t").exists()
    item, prompt = items[0], base.prompt
    asked = max(len(prompt.prompt_ids(base.tokenizer, q.text, item.text)) for q in item.questions)
    reply = max(len(prompt.answer_ids(base.tokenizer, q.reply)) for q in item.questions)
    monkeypatch.setattr(base.model.config, "max_position_embeddings", asked + reply)
    teach(base, [item], tmp_path / "plain", max_new_tokens=reply, phrased=False)
    with pytest.raises(InputError, match="beyond the model's window"):  # a question that says its answer is longer
        teach(base, [item], tmp_path / "t", max_new_tokens=reply)


def test_the_command_makes_what_a_recipe_reads(
    run: Run, recipe: Recipe, tmp_path: Path, tiny_dirs: tuple[str, str]
) -> None:
    folder = tmp_path / "taught"
    arguments = (tmp_path / "qa.jsonl", "--base", tiny_dirs[0], "-o", folder, "--reply-tokens", "5")
    code, out, err = run("teach", *arguments)
    assert code == 0 and out == f"{folder}\n", err
    recipe.base, recipe.mix, recipe.steps = tiny_dirs[0], recipe.mix[1:2], 3
    recipe.teacher.corpora, recipe.teacher.hidden = [str(folder)], 0.3
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    code, _, err = run("train", tmp_path / "r.yaml", "-o", tmp_path / "run")
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    # Five tokens of each reply, and a divergence, which is far below a random model's cross-entropy.
    assert [line["labels"] for line in steps] == [5 * recipe.documents] * 3
    assert all(0 < line["loss"] < 0.1 and line["hidden"] > 0 for line in steps)
    code, _, err = run("teach", tmp_path / "qa.jsonl", "--base", tiny_dirs[0], "-o", tmp_path / "run")
    assert code == 3 and "not empty" in one_line(err)


def test_ranks_share_the_work(items: list[Item], tmp_path: Path, tiny_dirs: tuple[str, str]) -> None:
    """Two processes of torchrun make all files, and the replies that one process makes."""
    rows = [
        {"id": f"{item.id}-{n}", "context": f"{item.text} {n}", "qas": [{"question": "Who?", "answers": ["Maro"]}]}
        for item in items
        for n in range(9)
    ]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hyperlora"]
    arguments = [
        "teach",
        str(tmp_path / "many.jsonl"),
        "--base",
        tiny_dirs[0],
        "--reply-tokens",
        "3",
        "--device",
        "cpu",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*begin, *arguments, "-o", str(tmp_path / "two")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'two'}\n", done.stderr[-2000:]
    base = load_base(tiny_dirs[0], device="cpu")
    loaded = TeacherCorpus(tmp_path / "two", base)
    assert len(list((tmp_path / "two").glob("part-*"))) == 5 and len(loaded) == len(rows)
    alone = load(str(tmp_path / "many.jsonl"))
    teach(base, alone[:4], tmp_path / "one", max_new_tokens=3)
    found = TeacherCorpus(tmp_path / "one", base)
    for item in alone[:4]:
        two, one = (corpus.find(item.text, item.questions[0].text) for corpus in (loaded, found))
        assert two is not None and one is not None and two.reply == one.reply


def test_replies_to_other_questions_are_no_teacher(
    base: BaseModel, recipe: Recipe, items: list[Item], tmp_path: Path
) -> None:
    others = [Item(item.id, f"{item.text} More.", item.questions) for item in items[:2]]
    for name, taught in (("own", items[:2]), ("other", others)):
        teach(base, taught, tmp_path / name, max_new_tokens=4)
    recipe.teacher.corpora = [str(tmp_path / "other")]
    with pytest.raises(InputError, match="no reply to any question that the recipe draws"):
        Student(base, recipe, []).check_taught(items)
    recipe.teacher.corpora += [str(tmp_path / "own")]
    Student(base, recipe, []).check_taught(items)
    teach(base, items[:2], tmp_path / "fewer", top_k=2, max_new_tokens=4)
    recipe.teacher.corpora += [str(tmp_path / "fewer")]
    with pytest.raises(InputError, match="different --top-k"):
        Student(base, recipe, [])


def test_a_certain_teacher_is_the_label(base: BaseModel) -> None:
    """KL from a teacher that is sure of the labels is their cross-entropy, and weights count."""
    plain = [Row(0, [5, 6, 7, 8, 9], 2), Row(0, [6, 5, 9], 1)]
    sure = (torch.tensor([[7], [8], [9]]), torch.full((3, 1), -1e-4), torch.tensor([1.0, 1.0, 1.0]))
    taught = [Row(0, [5, 6, 7, 8, 9], 2, sure), plain[1]]
    batch, other = collate(plain, base.device), collate(taught, base.device)
    expected = cross_entropy(base.model, batch)
    assert other.taught.tolist() == [True] * 3 + [False] * 2
    torch.testing.assert_close(reply_loss(label_logits(base.model, batch), batch), expected)
    torch.testing.assert_close(reply_loss(label_logits(base.model, other), other), expected, rtol=1e-2, atol=1e-2)
    none = collate([Row(0, plain[0].ids, 2, (*sure[:2], torch.zeros(3))), plain[1]], base.device)
    alone = collate(plain[1:], base.device)
    torch.testing.assert_close(
        reply_loss(label_logits(base.model, none), none, 0.5), cross_entropy(base.model, alone), rtol=1e-4, atol=1e-4
    )
    with_nll = expected + 0.5 * (expected - cross_entropy(base.model, alone))
    torch.testing.assert_close(reply_loss(label_logits(base.model, other), other, 0.5), with_nll, rtol=1e-2, atol=1e-2)


def test_the_distance_of_states_ignores_channels_that_are_large_everywhere() -> None:
    torch.manual_seed(0)
    teacher, noise = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    spread = state_spread(teacher)
    assert float(state_distance(teacher, teacher, spread)) == 0
    large = teacher + torch.tensor([1000.0] + [0.0] * 7)
    near = state_distance(teacher + 0.1 * noise, teacher, spread)
    far = state_distance(large + 0.1 * noise, large, state_spread(large))
    torch.testing.assert_close(near, far, rtol=1e-2, atol=1e-4)
    mean = teacher.mean(1, keepdim=True).expand_as(teacher)
    assert float(state_distance(mean, teacher, spread)) == pytest.approx(6.0)  # one to a token
    parts = [state_distance(mean[:, part], teacher[:, part], spread) for part in (slice(0, 1), slice(1, 6))]
    assert float(sum(parts)) == pytest.approx(6.0)  # also token by token


def test_the_teachers_hidden_states_are_those_of_the_document(recipe: Recipe, tmp_path: Path) -> None:
    """A student that also reads the document is at distance zero; contrast weighs what the document is worth."""
    recipe.teacher.hidden, recipe.teacher.hidden_layers = 1.0, 2
    run = trainer(recipe, tmp_path / "run")
    student, base = run.student, run.base
    assert student.matched == [1, 3]
    question = Question("What is the parrot called?", "Admiral", ("Admiral",))
    (row,) = student.rows(0, Item("a", LINES[0], (question,)), None)  # type: ignore[arg-type]
    assert row.told is not None and row.told[-row.labels :] == row.ids[row.start :]
    told = student._told([row])
    assert told is not None and told.shape == (2, row.labels, base.model.config.hidden_size)
    with torch.no_grad():
        states = base.model(torch.tensor([row.told]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(told[0], states[2][0, -row.labels - 1 : -1])
    gain = torch.arange(row.labels) - 1.0
    student.teachers = [_One(row.ids[row.start :], gain)]  # type: ignore[list-item]
    recipe.teacher.contrast = 2.0
    (weighed,) = student.rows(0, Item("a", LINES[0], (question,)), None)  # type: ignore[arg-type]
    assert weighed.likeliest is not None
    assert weighed.likeliest[2].tolist() == [1 + 2 * min(5.0, max(0.0, n - 1.0)) for n in range(row.labels)]


class _One:
    """A corpus with one reply to every question, of which the teacher is sure."""

    def __init__(self, reply: list[int], gain: torch.Tensor):
        sure = torch.full((len(reply), 1), -1e-3)
        self.taught = Taught(reply, torch.tensor(reply)[:, None], sure, gain)

    def find(self, *_: str) -> Taught:
        return self.taught


def test_units_are_taken_from_texts_that_fit_the_window(recipe: Recipe) -> None:
    """Learned positions end where the window does."""
    base = make_base("gpt2")
    recipe.teacher.hidden, recipe.calibration.tokens = 1.0, 10**6
    text = "word " * base.model.config.n_positions
    student = Student(base, recipe, [0])
    student.measure([text, text])
    assert student.spread.shape == (len(student.matched),) and bool((student.spread > 0).all())


def test_the_teachers_reply_is_learned(recipe: Recipe, tmp_path: Path) -> None:
    recipe.mix, recipe.teacher.contrast, recipe.teacher.hidden = recipe.mix[1:2], 1.0, 0.1
    recipe.teacher.nll = 0.5
    run = trainer(recipe, tmp_path / "run")
    run.student.teachers = [_One([9, 8, 7], torch.tensor([0.0, 1.0, 9.0]))]  # type: ignore[list-item]
    found = [run.train_step() for _ in range(30)]
    assert found[-1]["loss"] < 0.9 * found[0]["loss"] and found[0]["hidden"] > 0


def test_tasks_come_and_go_with_the_steps(recipe: Recipe, tmp_path: Path) -> None:
    changed = recipe.model_dump()
    changed["mix"][0]["to_step"], changed["mix"][1]["from_step"], changed["mix"][2]["from_step"] = 3, 3, 99
    run = trainer(Recipe.model_validate(changed), tmp_path / "run")
    drawn = []
    for step in range(6):
        before = list(run.drawing.mix.state)
        for _ in range(4):
            run.drawing.mix.draw(step)
        drawn.append([now - then for now, then in zip(run.drawing.mix.state, before, strict=True)])
    assert drawn == [[4, 0, 0]] * 3 + [[0, 4, 0]] * 3
    changed["mix"][1]["from_step"] = 4
    with pytest.raises(ValueError, match="no task of the mix is drawn in step 3"):
        Recipe.model_validate(changed)
