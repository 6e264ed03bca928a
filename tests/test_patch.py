import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hyperlora.base_model import BaseModel
from hyperlora.errors import BaseMismatch, InputError
from hyperlora.inject import patched
from hyperlora.patch import CONFIG, PROVENANCE, WEIGHTS, Patch

from .conftest import make_base, make_generator


@pytest.fixture
def patch(base: BaseModel, documents: list[str]) -> Patch:
    return make_generator(base).generate(documents[0])


def test_peft_gives_the_same_logits(any_base: BaseModel, documents: list[str], tmp_path: Path) -> None:
    patch = make_generator(any_base).generate(documents[0])
    patch.save(tmp_path / "patch")
    ids = torch.randint(3, 200, (2, 11))
    bare = any_base.model(ids).logits
    with patched(any_base.model, Patch.load(tmp_path / "patch")):
        ours = any_base.model(ids).logits
    assert (ours - bare).abs().max() > 0.01
    any_base.model.load_adapter(str(tmp_path / "patch"))
    torch.testing.assert_close(any_base.model(ids).logits, ours, rtol=1e-4, atol=1e-4)
    fresh = make_base(any_base.name.removeprefix("tiny-"))
    loaded = PeftModel.from_pretrained(fresh.model, str(tmp_path / "patch"))
    torch.testing.assert_close(loaded(ids).logits, ours, rtol=1e-4, atol=1e-4)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_peft_knows_every_key(base: BaseModel, patch: Patch, tmp_path: Path) -> None:
    patch.save(tmp_path / "patch")
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "patch"))
    result = model.load_adapter(str(tmp_path / "patch"), adapter_name="again")
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    config = json.loads((tmp_path / "patch" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == patch.rank
    assert config["rank_pattern"] == config["alpha_pattern"] == dict.fromkeys(patch.provenance.fixed, 2) != {}


def test_save_and_load_keep_everything(patch: Patch, tmp_path: Path) -> None:
    half = patch.to(torch.bfloat16)
    half.save(tmp_path / "patch")
    loaded = Patch.load(tmp_path / "patch")
    assert loaded.provenance == patch.provenance and loaded.dtype == torch.bfloat16
    assert loaded.nbytes == half.nbytes == patch.nbytes // 2
    for path, (a, b) in half.factors.items():
        assert torch.equal(loaded.factors[path][0], a) and torch.equal(loaded.factors[path][1], b)
    document = loaded.provenance.documents[0]
    assert document["tokens"] > 2 and len(document["sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["patch"]


@pytest.mark.parametrize("rslora", [False, True])
def test_load_folds_the_scale_in(patch: Patch, tmp_path: Path, rslora: bool) -> None:
    """Other tools may write the adapter back with an alpha of their own."""
    patch.save(tmp_path / "patch")
    path = tmp_path / "patch" / CONFIG
    config = json.loads(path.read_text())
    alphas = {name: 3 * rank for name, rank in config["rank_pattern"].items()}
    change = {"lora_alpha": 4 * config["r"], "alpha_pattern": alphas, "use_rslora": rslora}
    path.write_text(json.dumps({**config, **change}))
    loaded = Patch.load(tmp_path / "patch")
    for name, (a, b) in patch.factors.items():
        scale = (3 if name in alphas else 4) * (len(a) ** 0.5 if rslora else 1)
        torch.testing.assert_close(loaded.factors[name][1] @ loaded.factors[name][0], scale * b @ a)


@pytest.mark.parametrize("change", [{"r": 0}, {"lora_alpha": float("nan")}, {"lora_alpha": None}])
def test_impossible_scales_are_refused(patch: Patch, tmp_path: Path, change: dict) -> None:
    patch.save(tmp_path / "patch")
    path = tmp_path / "patch" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match="damaged patch"):
        Patch.load(tmp_path / "patch")


@pytest.mark.parametrize("file", [CONFIG, PROVENANCE])
def test_json_that_is_no_object_is_a_damaged_patch(patch: Patch, tmp_path: Path, file: str) -> None:
    patch.save(tmp_path / "patch")
    (tmp_path / "patch" / file).write_text("[]")
    with pytest.raises(InputError, match="damaged patch"):
        Patch.load(tmp_path / "patch")


def test_ctrl_c_between_two_renames_hides_nothing(
    patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch.save(tmp_path / "patch")
    rename, calls = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.save(tmp_path / "patch", force=True)
    assert len(calls) == 3 and [path.name for path in tmp_path.iterdir()] == ["patch"]
    Patch.load(tmp_path / "patch")


def test_compose_is_the_weighted_sum(base: BaseModel, documents: list[str]) -> None:
    one, two = make_generator(base).generate(documents[:2])
    both = Patch.compose([one, two], [1.0, -0.5])
    fixed = both.provenance.fixed
    assert fixed == one.provenance.fixed != () and both.factors.keys() == one.factors.keys()
    for path in fixed:  # what both have in common comes once
        torch.testing.assert_close(both.factors[path], one.factors[path])
    for path in one.factors.keys() - set(fixed):
        delta = [p.factors[path][1] @ p.factors[path][0] for p in (one, two, both)]
        torch.testing.assert_close(delta[2], delta[0] - 0.5 * delta[1], rtol=1e-4, atol=1e-5)
    assert [d["weight"] for d in both.provenance.documents] == [1.0, -0.5]
    assert Patch.compose([one, two], rank=4).rank == 4
    assert both.provenance.generator_hash == one.provenance.generator_hash  # one generator made both
    two = replace(two, provenance=replace(two.provenance, generator="other", generator_hash="cafe"))
    mixed = Patch.compose([one, two])
    assert mixed.provenance.generator == "tiny + other" and mixed.provenance.generator_hash.endswith(" + cafe")
    assert mixed.provenance.fixed == ()  # each generator's own part has to be there
    for path in one.factors:
        delta = [p.factors[path][1] @ p.factors[path][0] for p in (one, two, mixed)]
        torch.testing.assert_close(delta[2], delta[0] + delta[1], rtol=1e-4, atol=1e-5)
    for path in one.provenance.fixed:  # and not twice for two patches of one generator
        again = Patch.compose([one, one, two], [0.5, 1.0, 0.5])
        torch.testing.assert_close(
            again.factors[path][1] @ again.factors[path][0], 2 * one.factors[path][1] @ one.factors[path][0]
        )
    nested = Patch.compose([mixed, one], [1.0, 2.0])  # nor where a sum of several generators' patches has it
    assert nested.provenance.generator_hash == mixed.provenance.generator_hash
    for path in one.factors:
        delta = [p.factors[path][1] @ p.factors[path][0] for p in (mixed, one, nested)]
        more = 0.0 if path in fixed else 2 * delta[1]
        torch.testing.assert_close(delta[2], delta[0] + more, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="as many weights"):
        Patch.compose([one, two], [1.0])


def test_compose_holds_the_norm_of_the_sum(base: BaseModel, documents: list[str]) -> None:
    one, two = make_generator(base).generate(documents[:2])
    for weights, limit, rank in (([1.0, 1.0], 1.0, None), ([2.0, 1.0], 1.1, 4), ([1.0, -1.0], 9.0, None)):
        free = Patch.compose([one, two], weights, rank)
        held = Patch.compose([one, two], weights, rank, norm_limit=limit)
        for path, (a, b) in held.factors.items():
            if path in one.provenance.fixed:
                torch.testing.assert_close((a, b), one.factors[path])
                continue
            parts = [w * p.factors[path][1] @ p.factors[path][0] for w, p in zip(weights, (one, two), strict=True)]
            whole = free.factors[path][1] @ free.factors[path][0]
            bound = limit * max(float(part.norm()) for part in parts)
            expected = whole * min(1.0, bound / float(whole.norm()))
            torch.testing.assert_close(b @ a, expected, rtol=1e-4, atol=1e-5)
            assert float((b @ a).norm()) <= bound * 1.001
        assert held.provenance == free.provenance
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="use a positive number"):
            Patch.compose([one, two], norm_limit=wrong)


def test_a_merge_that_is_refused_changes_nothing(patch: Patch, base: BaseModel) -> None:
    before = {name: weight.clone() for name, weight in base.model.named_parameters()}
    last = base.model.get_submodule(list(patch.factors)[-1])
    last.weight = torch.nn.Parameter(last.weight.to(torch.int8), requires_grad=False)
    with (
        pytest.raises(InputError, match="quantised"),
        pytest.MonkeyPatch.context() as quantised,
    ):
        quantised.setattr(Patch, "check", lambda *_: None)
        patch.merge(base.model)
    for name, weight in base.model.named_parameters():
        assert weight.dtype == torch.int8 or torch.equal(weight, before[name])


def test_another_base_is_an_error_that_names_both(patch: Patch, base: BaseModel, documents: list[str]) -> None:
    other = make_base(seed=7)
    with pytest.raises(BaseMismatch, match=r"made for base tiny-llama .* not for"), patched(other.model, patch):
        pass
    with pytest.raises(BaseMismatch):
        patch.merge(other.model)
    with pytest.raises(BaseMismatch):
        Patch.compose([patch, make_generator(other).generate(documents[0])])


def test_existing_output_is_kept_unless_forced(patch: Patch, tmp_path: Path) -> None:
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "precious").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match=r"exists and holds other things \(precious\)"):
            patch.save(tmp_path / "patch", force=force)
    assert (tmp_path / "patch" / "precious").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        patch.save(tmp_path / "file", force=True)
    (tmp_path / "new").mkdir()
    patch.save(tmp_path / "new")  # an empty directory is as good as none
    with pytest.raises(InputError, match="--force"):
        patch.save(tmp_path / "new")
    patch.to(torch.float16).save(tmp_path / "new", force=True)
    assert Patch.load(tmp_path / "new").dtype == torch.float16
    with pytest.raises(InputError, match=f"patches of several documents; name one of them, such as {tmp_path / 'new'}"):
        Patch.load(tmp_path)


def test_full_disk_leaves_the_old_patch(patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch.save(tmp_path / "patch")
    before = (tmp_path / "patch" / WEIGHTS).read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hyperlora.patch.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        patch.to(torch.float16).save(tmp_path / "patch", force=True)
    assert (tmp_path / "patch" / WEIGHTS).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["patch"]


def test_damaged_patches_are_refused(patch: Patch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a hyperlora patch"):
        Patch.load(tmp_path / "nothing")
    whole = tmp_path / "whole"
    patch.save(whole)
    tensors = load_file(whole / WEIGHTS)
    key = next(k for k in tensors if "lora_B" in k)

    def variant(name: str, change: object) -> Path:
        shutil.copytree(whole, tmp_path / name)
        save_file({**tensors, key: change}, tmp_path / name / WEIGHTS)  # type: ignore[dict-item]
        return tmp_path / name

    with pytest.raises(InputError, match="shapes"):
        Patch.load(variant("shape", torch.zeros(32, patch.rank + 1)))
    with pytest.raises(InputError, match="non-finite"):
        Patch.load(variant("nan", torch.full_like(tensors[key], float("nan"))))
    (whole / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        Patch.load(whole)
    a, b = next(iter(patch.factors.values()))
    with pytest.raises(InputError, match="non-finite"):
        Patch({"x": (a * float("inf"), b)}, patch.provenance).save(tmp_path / "inf")
    assert not (tmp_path / "inf").exists()


def test_the_hub_takes_and_gives_the_directory(patch: Patch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, list[str]] = {}

    class Hub:
        def __init__(self, token: str | None) -> None: ...
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None: ...
        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            seen[repo_id] = sorted(p.name for p in folder_path.iterdir())
            return f"https://example.org/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert patch.push_to_hub("me/patch") == "https://example.org/me/patch"
    patch.save(tmp_path / "downloaded")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "downloaded"))
    assert Patch.load("me/patch").rank == patch.rank
    assert {"adapter_config.json", WEIGHTS, "hyperlora.json"} <= set(seen["me/patch"])
