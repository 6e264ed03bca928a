"""YAML that users write."""

from pathlib import Path

import pytest

from hyperlora.compare.experiment import read_experiment
from hyperlora.errors import InputError
from hyperlora.recipe import read_recipe
from hyperlora.settings import read_yaml


@pytest.mark.parametrize("read", [read_experiment, read_recipe, lambda path: read_yaml(path, "file")])
@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ("seed: 1\nsteps: 2\nseed: 1\n", 3, "seed", 1),
        ("methods:\n  head: {method: none}\n  'head': {method: full}\n", 3, "head", 2),
        ("mix:\n  - {task: facts,\n     task: qa}\n", 3, "task", 2),
        ("1: a\n1: b\n", 2, "1", 1),
    ],
)
def test_a_key_that_stands_twice_is_named(
    tmp_path: Path, read: object, text: str, line: int, key: str, first: int
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read(path)  # type: ignore[operator]
    assert str(caught.value) == f"{path}, line {line}: the key {key!r} stands in line {first} already; remove one"


def test_keys_of_other_mappings_and_merged_ones_may_be_the_same(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "one: &one {a: {b: &two {<<: {a: 1}, a: 2}}}\nother: {<<: *one, c: {<<: *two, a: 3}}\n1: x\n'1': y\n"
    )
    a = {"b": {"a": 2}}
    assert read_yaml(path, "file") == {"one": {"a": a}, "other": {"a": a, "c": {"a": 3}}, 1: "x", "1": "y"}


def test_files_that_are_no_yaml_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    for content, message in (
        (b"a: [", "is not valid YAML"),
        (b"a: K\xe4se", "is not valid YAML"),
        (None, "cannot read the file"),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_yaml(path, "file")
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
