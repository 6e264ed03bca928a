import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyperlora.base_model import BaseModel
from hyperlora.errors import BaseMismatch, InputError
from hyperlora.generator import Generator
from hyperlora.generator_config import GeneratorConfig
from hyperlora.generator_files import CONFIG, WEIGHTS
from hyperlora.hypernet import HYPERNETS
from hyperlora.hypernet.slots import Slots
from hyperlora.live_bytes import LiveBytes
from hyperlora.patch import Patch

from .conftest import make_base, make_generator


def delta(patch: Patch) -> torch.Tensor:
    return torch.cat([(b @ a).flatten() for a, b in patch.factors.values()])


def same(one: Patch, other: Patch) -> None:
    torch.testing.assert_close(delta(one), delta(other), rtol=0, atol=1e-4 * float(delta(one).abs().max()))


def test_a_patch_depends_on_its_document_alone(any_base: BaseModel, documents: list[str]) -> None:
    generator = make_generator(any_base)
    together = generator.generate(documents)
    permuted = generator.generate(documents[::-1])[::-1]
    for document, one, other in zip(documents, together, permuted, strict=True):
        alone = generator.generate(document)
        same(alone, one)
        same(alone, other)
        same(alone, generator.generate(document))
    assert (delta(together[0]) - delta(together[1])).abs().max() > 0.1 * delta(together[0]).abs().max()
    one, other = ({path: b @ a for path, (a, b) in patch.factors.items()} for patch in (together[0], together[1]))
    unlike = [path for path in one if not torch.equal(one[path], other[path])]
    assert unlike == [site.path for site in generator.sites]
    assert together[0].factors.keys() - set(unlike) == set(together[0].provenance.fixed) != set()


def test_long_documents_among_short_ones_change_nothing(base: BaseModel, documents: list[str]) -> None:
    generator = make_generator(base, chunk_tokens=20)
    texts = [documents[0] * 2, documents[1][:12], documents[2] * 2, documents[0][:12]]
    counts = [len(generator.encoder.chunks(generator.encoder.tokenize(text))) for text in texts]
    assert counts[0] > 1 and counts[1] == 1 and counts[2] > 1 and counts[3] == 1
    for text, patch in zip(texts, generator.generate(texts), strict=True):
        same(generator.generate(text), patch)


@pytest.fixture(params=sorted(HYPERNETS))
def family(base: BaseModel, request: pytest.FixtureRequest) -> Generator:
    return make_generator(base, request.param)


def test_company_and_order_change_no_patch(family: Generator, documents: list[str]) -> None:
    permuted = family.generate(documents[::-1])[::-1]
    for document, other in zip(documents, permuted, strict=True):
        same(family.generate(document), other)
    assert (delta(permuted[0]) - delta(permuted[1])).norm() > 0.1 * delta(permuted[0]).norm()


@pytest.mark.parametrize("name", sorted(HYPERNETS))
def test_rank_is_capped(base: BaseModel, documents: list[str], name: str) -> None:
    written, capped = (make_generator(base, name, rank=rank).generate(documents[0]) for rank in (500, 2))
    assert capped.rank == 2 < written.rank


@pytest.mark.parametrize("name", ["memory_tokens", "perceiver"])
def test_chunks_fold_like_one_sum(base: BaseModel, documents: list[str], name: str) -> None:
    """Folding chunk by chunk loses nothing while the working rank holds every rank."""
    generator = make_generator(base, hypernet=name, rank=64, chunk_tokens=20)
    ids = generator.encoder.tokenize(" ".join(documents))[:50]
    chunks = generator.encoder.chunks(ids)
    assert len(chunks) == 3
    generator.requires_grad_(False)
    folded = generator.factors([ids])
    parts = [generator.factors([chunk]) for chunk in chunks]
    for module in generator.hypernet.fixed:
        torch.testing.assert_close(folded[module.path], parts[0][module.path])
    for site in generator.sites:
        (a, b), path = folded[site.path], site.path
        whole = sum(part[path][1] @ part[path][0] for part in parts)
        best = torch.linalg.matrix_rank(whole[0]).item()
        assert best <= 32  # the width of the model: rank 64 is exact
        torch.testing.assert_close(b @ a, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_chunks_of_slots_fold_like_one_document(base: BaseModel, documents: list[str]) -> None:
    """Slots of all chunks compete with each other: as if all of them had been one chunk's."""
    generator = make_generator(base, rank=5, chunk_tokens=20)
    ids = generator.encoder.tokenize(" ".join(documents))[:50]
    chunks = generator.encoder.chunks(ids)
    assert len(chunks) == 3
    with torch.no_grad():
        folded = generator.factors([ids])
        parts = [generator._write([chunk], None) for chunk in chunks]
    for index, (site, stat) in enumerate(zip(generator.sites, generator.statistics, strict=True)):
        groups = zip(*(part[index] for part in parts), strict=True)
        slots = [
            Slots(torch.cat([s.x for s in group], 1), torch.cat([s.values for s in group], 1), group[0].ridge)
            for group in groups
        ]
        a, b = generator.hypernet.factors([tuple(slots)], [stat], 5)[0]  # type: ignore[list-item]
        found_a, found_b = folded[site.path]
        torch.testing.assert_close(found_b @ found_a, b @ a, rtol=1e-3, atol=1e-3 * float((b @ a).abs().max()))


@pytest.mark.parametrize("limit", [None, 1.1])
@torch.no_grad()
def test_several_documents_are_like_chunks_of_one(family: Generator, documents: list[str], limit: float | None) -> None:
    family.config = family.config.model_copy(update={"norm_limit": limit, "rank_tokens": 30, "max_rank": 20})
    whole = family.generate_together(documents)
    tokens = [family.encoder.tokenize(text) for text in documents]
    total = sum(map(len, tokens))
    assert family.config.rank < whole.rank <= family.config.rank_of(total)
    assert [document["tokens"] for document in whole.provenance.documents] == [len(own) for own in tokens]
    family.encoder.chunks = lambda ids: tokens if len(ids) == total else [ids]  # type: ignore[method-assign]
    glued = family.factors([[token for own in tokens for token in own]])
    for path, (a, b) in whole.factors.items():
        expected = (glued[path][1] @ glued[path][0]).reshape(len(b), a.shape[1])
        torch.testing.assert_close(b @ a, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    same(family.generate_together(documents[:1]), family.generate(documents[0]))
    with pytest.raises(InputError, match="no documents"):
        family.generate_together([])


@torch.no_grad()
def test_memory_does_not_grow_with_the_number_of_chunks(base: BaseModel) -> None:
    for name in HYPERNETS:
        generator = make_generator(base, name, chunk_tokens=80, max_rank=None)
        ids = generator.encoder.tokenize("The keeper saw the ship pass the rock in fog. " * 200)
        peaks = []
        for chunks in (8, 32):
            read = ids[: 60 * chunks + 20]
            assert len(generator.encoder.chunks(read)) == chunks
            with LiveBytes([*base.model.parameters(), *generator.parameters(), *generator.buffers()]) as live:
                generator.factors([read])
            peaks.append(live.peak)
        assert peaks[1] < 1.05 * peaks[0], (name, peaks)


def test_longer_documents_may_have_more_ranks(base: BaseModel, documents: list[str]) -> None:
    """In proportion to their length, up to the largest, in one chunk or several, beside short ones."""
    generator = make_generator(base, rank=4, max_rank=10, rank_tokens=20, chunk_tokens=48)
    ids = generator.encoder.tokenize(" ".join(documents) * 2)
    texts = [generator.base.tokenizer.decode(ids[:size]) for size in (30, 15, 80, 18)]
    tokens = [generator.encoder.tokenize(text) for text in texts]
    assert [len(generator.encoder.chunks(own)) for own in tokens] == [1, 1, 2, 1]
    assert generator.calls(tokens) == 4
    assert [patch.rank for patch in generator.generate(texts)] == [8, 4, 10, 4]
    for text, patch in zip(texts, generator.generate(texts), strict=True):
        same(generator.generate(text), patch)


def test_the_hypernetwork_can_be_called_more_often_to_no_effect(base: BaseModel, documents: list[str]) -> None:
    generator = make_generator(base, chunk_tokens=16)
    ids = [generator.encoder.tokenize(text) for text in documents[:2]]
    wanted, calls = generator.calls(ids), []
    assert wanted == sum(-(-(len(own) - 4) // 12) for own in ids) > 2  # of 16 tokens, 4 of them the last chunk's

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return generator.hypernet(*arguments)

    generator.through = counted
    plain = generator.factors(ids)
    assert len(calls) == wanted
    more = generator.factors(ids, calls=wanted + 2)
    assert len(calls) == 2 * wanted + 2
    for path, factors in plain.items():
        torch.testing.assert_close(more[path], factors)


def test_the_norm_of_folded_chunks_is_held(base: BaseModel, documents: list[str]) -> None:
    """In the metric of generic inputs, against dense matrices; one chunk is left alone; the limit has a gradient."""
    free = make_generator(base, rank=64, chunk_tokens=20)
    held = make_generator(base, rank=64, chunk_tokens=20, norm_limit=1.1)
    held.load_state_dict(free.state_dict())
    ids = free.encoder.tokenize(" ".join(documents))[:60]
    with torch.no_grad():
        parts = [free.factors([chunk]) for chunk in free.encoder.chunks(ids)]
        whole = free.factors([ids])
    found = held.factors([ids])
    limited = 0
    for site, stat in zip(free.sites, free.statistics, strict=True):
        root = torch.linalg.cholesky(stat.moment.dense())
        sizes = [float((part[site.path][1] @ part[site.path][0] @ root).norm()) for part in parts]
        update = whole[site.path][1] @ whole[site.path][0]
        scale = min(1.0, 1.1 * max(sizes) / float((update @ root).norm()))
        limited += scale < 1
        a, b = found[site.path]
        torch.testing.assert_close(b @ a, scale * update, rtol=1e-3, atol=1e-4 * float(update.abs().max()))
    assert limited > 0
    sum(b.sum() for _, b in found.values()).backward()  # type: ignore[union-attr]
    assert all(bool(torch.isfinite(p.grad).all()) for p in held.parameters() if p.grad is not None)
    alone, same = held.factors([ids[:15]]), free.factors([ids[:15]])
    assert all(torch.equal(alone[path][1], same[path][1]) for path in alone)


def test_save_and_load(family: Generator, documents: list[str], tmp_path: Path) -> None:
    generator = family
    generator.save_pretrained(tmp_path / "g")
    one, two = (Generator.from_pretrained(tmp_path / "g", generator.base) for _ in range(2))
    assert one.provenance == two.provenance == generator.provenance
    same(one.generate(documents[0]), two.generate(documents[0]))
    rounded, exact = delta(one.generate(documents[0])), delta(generator.generate(documents[0]))
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(InputError, match="--force"):
        generator.save_pretrained(tmp_path / "g")


def test_another_base_is_refused(generator: Generator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path / "g")
    with pytest.raises(BaseMismatch, match=r"tiny-llama .* not for tiny-llama"):
        Generator.from_pretrained(tmp_path / "g", make_base(seed=5))


def test_damaged_generators_are_refused(generator: Generator, tmp_path: Path) -> None:
    folder = tmp_path / "g"
    generator.save_pretrained(folder)
    with pytest.raises(InputError, match="no generator at"):
        Generator.from_pretrained(tmp_path / "none")
    whole = (folder / WEIGHTS).read_bytes()
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, folder / WEIGHTS)
    with pytest.raises(InputError, match="non-finite"):
        Generator.from_pretrained(folder, generator.base)
    save_file({**tensors, name: torch.zeros(3)}, folder / WEIGHTS)
    with pytest.raises(InputError, match="does not fit"):
        Generator.from_pretrained(folder, generator.base)
    for lost, changes in ((name, GeneratorConfig()), ("statistics.0.gain", GeneratorConfig(rank=3))):
        save_file({kept: tensor for kept, tensor in tensors.items() if kept != lost}, folder / WEIGHTS)
        with pytest.raises(InputError, match="does not fit"):
            Generator.from_pretrained(folder, generator.base, changes)
    (folder / WEIGHTS).write_bytes(whole)
    with pytest.raises(InputError, match=r"other modules of .* than it shall have now"):
        Generator.from_pretrained(folder, generator.base, GeneratorConfig(layers=[2, 3]))
    assert Generator.from_pretrained(folder, generator.base, GeneratorConfig(rank=3)).config.rank == 3
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no usable generator"):
        Generator.from_pretrained(folder, generator.base)
    (folder / WEIGHTS).write_bytes(whole)
    record = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**record, "sites": record["sites"][1:]}))
    with pytest.raises(InputError, match="other modules"):
        Generator.from_pretrained(folder, generator.base)
    huge = {**record["generator"], "options": {**record["generator"]["options"], "width": 2**20, "heads": 2}}
    (folder / CONFIG).write_text(json.dumps({**record, "generator": huge}))
    with pytest.raises(InputError, match="does not fit"):  # and not out of memory: shapes come first
        Generator.from_pretrained(folder, generator.base)
    record["generator"]["rank"] = "many"
    (folder / CONFIG).write_text(json.dumps(record))
    with pytest.raises(InputError, match="no usable generator"):
        Generator.from_pretrained(folder, generator.base)


def test_no_documents_are_no_patches(generator: Generator) -> None:
    assert generator.generate([]) == []


def test_non_finite_patches_are_not_handed_out(generator: Generator, documents: list[str]) -> None:
    generator.hypernet.copy[0].scale.data.fill_(float("nan"))
    with pytest.raises(InputError, match="non-finite"):
        generator.generate(documents[0])


def test_a_row_that_is_not_finite_is_not_dropped(
    generator: Generator, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rows of zeros are, which fill up a batch."""
    factors = generator.factors([generator.encoder.tokenize(text) for text in documents])
    first = next(iter(factors))
    factors[first][0][:, 0] = float("nan")
    monkeypatch.setattr(generator, "factors", lambda *_: factors)
    with pytest.raises(InputError, match="non-finite"):
        generator.generate(documents)


def test_patch_survives_float16(generator: Generator) -> None:
    """Short documents are not capped; their factors must be balanced to fit 16 bits."""
    exact = generator.generate("Maro bakes")
    for a, b in (exact.factors[site.path] for site in generator.sites):
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-6)
    assert (delta(exact.to(torch.float16).to(torch.float32)) - delta(exact)).norm() < 2e-3 * delta(exact).norm()


def test_batch_company_leaves_no_zero_rows(base: BaseModel, documents: list[str]) -> None:
    generator = make_generator(base, rank=500)  # nothing is capped: two slots per token
    short, long = generator.generate([documents[0][:20], documents[0]])
    assert short.rank == 2 * short.provenance.documents[0]["tokens"] < long.rank
    same(short, generator.generate(documents[0][:20]))


def test_bfloat16_base(family: Generator, documents: list[str]) -> None:
    exact = family.generate(documents[0])
    half = make_base()
    half.model.to(torch.bfloat16)
    close = make_generator(half, family.config.hypernet).generate(documents[0])
    assert (delta(close) - delta(exact)).norm() < 0.3 * delta(exact).norm()
