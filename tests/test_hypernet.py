import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.generator import Generator
from hyperlora.generator_config import GeneratorConfig
from hyperlora.hypernet import HYPERNETS, Associative, Hybrid, MemoryTokens, Pair, Perceiver, Reading, Shape
from hyperlora.hypernet.adapter import adapter_factors
from hyperlora.hypernet.associative import _Move, strongest
from hyperlora.hypernet.slots import Slots
from hyperlora.patch import Patch
from hyperlora.structure import Site

from .conftest import OPTIONS, TEXT, make_base, make_generator


def uncapped(generator: Generator, reading: Reading) -> list[Pair]:
    return generator._capped(generator.hypernet(reading, generator.statistics), 10**6)


@pytest.mark.parametrize("name", sorted(HYPERNETS))
def test_contract(any_base: BaseModel, documents: list[str], name: str) -> None:
    """Shapes, zero padded rows, and a gradient to every parameter."""
    generator = make_generator(any_base, hypernet=name)
    ids = [generator.encoder.tokenize(text) for text in documents[:2]]
    reading = generator.encoder.open(ids)
    factors = uncapped(generator, reading)
    loss = torch.zeros(())
    changed = [*generator.sites, *generator.hypernet.fixed]
    for index, (site, (a, b)) in enumerate(zip(changed, factors, strict=True)):
        count = 1 if site in generator.hypernet.fixed else 2
        assert a.shape == (count, b.shape[2], site.d_in) and b.shape[:2] == (count, site.d_out)
        loss = loss + torch.tanh(b @ a).square().sum()
        alone = uncapped(generator, generator.encoder.open(ids[1:]))[index]
        torch.testing.assert_close((b @ a)[-1], (alone[1] @ alone[0])[0], rtol=1e-4, atol=1e-4)
    loss.backward()
    silent = [n for n, p in generator.hypernet.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("name", sorted(HYPERNETS))
def test_patches_load(base: BaseModel, documents: list[str], name: str, tmp_path: Path) -> None:
    generator = make_generator(base, hypernet=name)
    patch = generator.generate(documents[0])
    patch.save(tmp_path / "patch")
    loaded = Patch.load(tmp_path / "patch")
    loaded.check(base.model)
    for site in generator.sites:
        torch.testing.assert_close(loaded.factors[site.path], patch.factors[site.path])


def test_the_strongest_tokens_point_whatever_the_padding() -> None:
    strength = torch.tensor([[0.2, 0.9, 0.5, 0.5, 0.7], [0.3, 0.1, 9.0, 9.0, 9.0]])[..., None]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert strongest(strength, mask, 3).squeeze(-1).tolist() == [[1, 2, 4], [0, 1, 2]]
    assert strongest(strength, mask, 9).shape == (2, 5, 1)


def test_long_documents_have_few_pointers_and_short_ones_lose_none(documents: list[str]) -> None:
    base, few = make_base(), 12
    free = make_generator(base, options={**OPTIONS["associative"], "pointers": 500})
    capped = make_generator(base, options={**OPTIONS["associative"], "pointers": few})
    for text, same in ((documents[0][:25], True), (documents[0], False)):
        ids = free.encoder.tokenize(text)
        assert (len(ids) <= few) is same
        reading = free.encoder.open([ids])
        (a, b), (capped_a, capped_b) = (uncapped(g, reading)[0] for g in (free, capped))
        assert capped_a.shape[1] == len(ids) + min(few, len(ids))
        assert torch.allclose(b @ a, capped_b @ capped_a, atol=1e-5) is same
    with_others = capped.factors([capped.encoder.tokenize(text) for text in documents])
    alone = capped.factors([capped.encoder.tokenize(documents[1])])
    for path, (a, b) in alone.items():
        torch.testing.assert_close(
            (with_others[path][1] @ with_others[path][0])[:2][-1], (b @ a)[0], rtol=1e-4, atol=1e-4
        )


def test_salience_weighs_tokens_equally_at_first_and_then_each_as_it_says(
    base: BaseModel, documents: list[str]
) -> None:
    """In inputs and values of copies and pointers alike, so that the regression is a weighted one."""
    plain = make_generator(base)
    weighed = Generator(base, plain.config.changed(GeneratorConfig(options={"salience": True})))
    weighed.load_state_dict(weighed.state_dict() | plain.state_dict())
    hypernet = weighed.hypernet
    assert isinstance(hypernet, Associative) and hypernet.salience
    reading = plain.encoder.open([plain.encoder.tokenize(documents[0])])
    before, same = (g.hypernet(reading, g.statistics) for g in (plain, weighed))
    torch.nn.init.normal_(hypernet.salience.weight, std=0.3)
    after = hypernet(reading, weighed.statistics)
    features = reading.adapted(dict(zip([m.path for m in hypernet.fixed], before[2:], strict=True)))
    counts = 2 * torch.sigmoid(hypernet.salience(hypernet._read(features)))
    assert bool((counts.amax() / counts.amin()) > 1.2)
    for was, still, now in zip(before[:2], same[:2], after[:2], strict=True):
        for own, equal, other in zip(was, still, now, strict=True):
            torch.testing.assert_close((equal.x, equal.values), (own.x, own.values))
            torch.testing.assert_close((other.x, other.values), (own.x * counts, own.values * counts))


def test_keys_are_those_of_the_inputs_until_they_are_moved(base: BaseModel, documents: list[str]) -> None:
    settings = GeneratorConfig(layers=[1, 3], rank=6, moment_directions=4, options=OPTIONS["associative"])
    generator = Generator(base, settings)
    generator.calibrate([TEXT])
    reading = generator.encoder.open([generator.encoder.tokenize(documents[0])])
    hypernet, x = generator.hypernet, reading.features.inputs
    assert isinstance(hypernet, Associative)
    fresh = hypernet(reading, generator.statistics)
    fresh = fresh[: len(x)]  # without the adapter's, which has no effect yet
    for own, (copies, _) in zip(x, fresh, strict=True):
        torch.testing.assert_close(copies.x, own)
    for name, weight in hypernet.named_parameters():
        if name.endswith(("to_copies.weight", "to_pointers.weight")):
            torch.nn.init.normal_(weight)
    after = hypernet(reading, generator.statistics)[: len(x)]
    for was, groups in zip(fresh, after, strict=True):
        for slots, moved in zip(was, groups, strict=True):
            assert bool(((moved.x - slots.x).abs().amax(-1) > 1e-3).all())


def test_documents_are_read_with_the_adapter_that_answers(any_base: BaseModel, documents: list[str]) -> None:
    """Keys are made of what a base sees that the patch's fixed part is merged into; it is on attention's inputs."""
    generator = make_generator(any_base, options={**OPTIONS["associative"], "moves": 0})
    modules = [module.path.rpartition(".")[2] for module in generator.hypernet.fixed]
    assert len(modules) % 4 == 0 and not any("o_proj" in name or "mlp" in name or name == "c_proj" for name in modules)
    patch = generator.generate(documents[0])
    ids = generator.encoder.tokenize(documents[0])
    slots = generator.hypernet(generator.encoder.open([ids]), generator.statistics)
    fixed = {path: patch.factors[path] for path in patch.provenance.fixed}
    Patch(fixed, patch.provenance).merge(any_base.model)
    for own, (copies, _) in zip(generator.encoder.read([ids]).inputs, slots, strict=False):
        torch.testing.assert_close(copies.x, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


def test_without_an_adapter_nothing_is_fixed(base: BaseModel, documents: list[str]) -> None:
    bare = make_generator(base, options={**OPTIONS["associative"], "adapter_rank": 0})
    patch = bare.generate(documents[0])
    assert patch.provenance.fixed == () and list(patch.factors) == [site.path for site in bare.sites]


def test_keys_move_in_units_of_their_channels() -> None:
    """Channels that are larger everywhere, by whatever factor, are moved further by it, and nothing else changes."""
    torch.manual_seed(0)
    move, x, z, spread = _Move(5, 3, 8, True), torch.randn(1, 4, 8), torch.randn(1, 4, 5), torch.rand(8) + 0.5
    torch.nn.init.normal_(move.to_copies.weight)
    larger = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    hidden, same = move(x, z, spread), move(x * larger, z, spread * larger)
    torch.testing.assert_close(same, hidden)
    shift = move.to_copies(hidden, spread)
    torch.testing.assert_close(shift, (hidden @ move.to_copies.weight.T) * spread)
    torch.testing.assert_close(move.to_copies(same, spread * larger), shift * larger)


def test_latent_slots_are_as_many_for_any_length_and_answer_what_they_point_at(
    base: BaseModel, documents: list[str]
) -> None:
    """Their values lie among the document's words; without them the hybrid is an associative memory."""
    hybrid = make_generator(base, hypernet="hybrid")
    plain = make_generator(base, options=OPTIONS["associative"] | {"salience": True})
    assert isinstance(hybrid.hypernet, Hybrid)
    for value in hybrid.hypernet.value:
        torch.nn.init.zeros_(value.learned.weight)  # type: ignore[union-attr, arg-type]
    encoder = hybrid.encoder
    for text in (documents[0][:9], TEXT):
        reading = encoder.open([encoder.tokenize(text)])
        for *_, own in hybrid.hypernet(reading, hybrid.statistics)[:2]:
            assert isinstance(own, Slots) and own.x.shape[1] == 3
            words = reading.features.words[0]
            mixed = torch.linalg.lstsq(words.mT, own.values[0].mT).solution
            torch.testing.assert_close(words.mT @ mixed, own.values[0].mT, rtol=1e-3, atol=1e-3)
    plain.load_state_dict(hybrid.state_dict(), strict=False)
    ids = [encoder.tokenize(text) for text in documents]
    with torch.no_grad():
        assert not alike(hybrid.factors(ids), plain.factors(ids))
        for value in hybrid.hypernet.value:
            value.scale.zero_()  # type: ignore[union-attr, operator]
        assert alike(hybrid.factors(ids), plain.factors(ids))
    with pytest.raises(InputError, match=r"latents .0. must be at least 1"):
        make_generator(base, hypernet="hybrid", options={**OPTIONS["hybrid"], "latents": 0})


def alike(some: dict[str, Pair], others: dict[str, Pair]) -> bool:
    """Whether two patches change their modules alike."""
    pairs = ((some[path], others[path]) for path in some)
    return all(torch.allclose(b @ a, d @ c, rtol=1e-3, atol=1e-5) for (a, b), (c, d) in pairs)


def test_latents_do_not_grow_with_the_document(base: BaseModel, documents: list[str]) -> None:
    """Nor does the number of ranks, and the activations of typical inputs start at order 1."""
    generator = make_generator(base, hypernet="perceiver")
    hypernet, encoder = generator.hypernet, generator.encoder
    assert isinstance(hypernet, Perceiver)
    short, long = encoder.open([encoder.tokenize(documents[0][:9])]), encoder.open([encoder.tokenize(TEXT)])
    for reading in (short, long):
        latents = hypernet.read(reading.features, generator.statistics)
        assert latents.shape == (1, 2, 3, 16)
        torch.testing.assert_close(latents.norm(dim=-1), torch.ones(1, 2, 3))
        for x, (a, _) in zip(long.features.inputs, hypernet(reading, generator.statistics), strict=True):
            assert a.shape[1] == 5
            assert 0.2 < float((x[0] @ a[0].T).detach().square().mean().sqrt()) < 1.5


def test_an_untrained_perceiver_echoes_its_document(base: BaseModel) -> None:
    """From one document to another its keys change as the inputs do, and its values as the words do."""
    options = {**OPTIONS["perceiver"], "width": 64, "fixed_ranks": 0}
    generator = make_generator(base, hypernet="perceiver", options=options)
    pieces = [TEXT[start : start + 40] for start in range(0, len(TEXT) - 40, 20)]
    reading = generator.encoder.open([generator.encoder.tokenize(piece) for piece in pieces])
    features = reading.features
    assert len(pieces) > 8

    def typical(x: torch.Tensor) -> torch.Tensor:
        """The mean over tokens, without what all documents have in common (documents, width)."""
        means = (x * features.mask[..., None]).sum(1) / features.mask.sum(1, keepdim=True)
        return means - means.mean(0)

    for x, stat, (a, b) in zip(
        features.inputs, generator.statistics, generator.hypernet(reading, generator.statistics), strict=True
    ):
        size = stat.moment.diagonal.sqrt()
        keys = (a @ stat.moment.dense() / size).mean(1)
        values = (b * stat.gain[:, None]).mean(2)
        for made, seen in ((keys, x / size), (values, features.following)):
            alike = F.cosine_similarity(made - made.mean(0), typical(seen), dim=1)
            assert float(alike.detach().mean()) > 0.3, alike


def test_fixed_ranks_are_the_same_for_all_documents_and_can_be_left_out(base: BaseModel, documents: list[str]) -> None:
    generator = make_generator(base, hypernet="perceiver")
    reading = generator.encoder.open([generator.encoder.tokenize(text) for text in documents])
    for a, b in generator.hypernet(reading, generator.statistics):
        for ranks in (a, b.mT):  # (documents, ranks, width): three read from the document, then two fixed
            assert torch.equal(ranks[0, 3:], ranks[1, 3:]) and ranks[0, 3:].any()
            assert (ranks[0, :3] - ranks[1, :3]).abs().amax(dim=-1).min() > 0
    none = make_generator(base, hypernet="perceiver", options={**OPTIONS["perceiver"], "fixed_ranks": 0})
    assert [a.shape[1] for a, _ in none.hypernet(reading, none.statistics)] == [3, 3]


def test_output_scales_size_the_patch_linearly(base: BaseModel, documents: list[str]) -> None:
    generator = make_generator(base, hypernet="perceiver")
    reading = generator.encoder.open([generator.encoder.tokenize(documents[0])])
    before = generator.hypernet(reading, generator.statistics)
    assert isinstance(generator.hypernet, Perceiver)
    generator.hypernet.output_scale.data *= torch.tensor([[3.0], [1.0]])
    for factor, (a, b), (scaled_a, scaled_b) in zip(
        (3.0, 1.0), before, generator.hypernet(reading, generator.statistics), strict=True
    ):
        torch.testing.assert_close(scaled_b @ scaled_a, factor * (b @ a))


@pytest.mark.parametrize(
    ("options", "d_out", "message"),
    [
        ({"heads": 3}, 32, "heads .3. must divide width .16."),
        ({"latents": 0}, 32, "latents .0. must be at least 1"),
        ({"fixed_ranks": -1}, 32, "fixed_ranks .-1. must be at least 0"),
        ({"scale": 0.0}, 32, "scale .0.0. must be positive"),
        ({}, 48, "layers.1.up_proj does not"),
    ],
)
def test_options_the_perceiver_cannot_use(options: dict[str, float], d_out: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Perceiver(Shape([Site("layers.1.up_proj", 1, 48, d_out)], [], [], 32), **{**OPTIONS["perceiver"], **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width .0. must be at least 1"),
        ({"heads": 0}, "heads .0. must be at least 1"),
        ({"pointers": -1}, "pointers .-1. must be at least 0"),
        ({"ridge": 0.0}, "ridge .0.0. must be positive"),
        ({"reach": 1.0}, "reach .1.0. must be greater than 1"),
    ],
)
def test_options_the_associative_memory_cannot_use(base: BaseModel, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_generator(base, options={**OPTIONS["associative"], **options})


def test_memory_tokens_are_as_many_as_the_numbers_of_a_layer(base: BaseModel, documents: list[str]) -> None:
    """Behind every layer they hold A and B of its sites; a layer with two sites sets their number."""
    modules = ["mlp.down_proj", "self_attn.o_proj"]
    generator = make_generator(base, hypernet="memory_tokens", modules=modules)
    assert isinstance(generator.hypernet, MemoryTokens)
    assert len(generator.hypernet.tokens) == math.ceil(3 * ((48 + 32) + (32 + 32)) / 32)
    reading = generator.encoder.open([generator.encoder.tokenize(documents[0])])
    found = dict(zip([s.path for s in generator.sites], generator.hypernet(reading, generator.statistics), strict=True))
    assert [tuple(a.shape) for a, _ in found.values()] == [(1, 3, site.d_in) for site in generator.sites]

    class Told(Reading):
        """Other hidden states behind layer 3 change its sites, and through the blocks those of layer 1."""

        features = reading.features

        def adapted(self, adapter: Any) -> Any:
            raise AssertionError("memory tokens look at what the base makes of them alone")

        def memory(self, tokens: torch.Tensor, adapter: Any, layers: Any) -> torch.Tensor:
            assert layers == [1, 3]
            return reading.memory(tokens, adapter, layers) * torch.tensor([1.0, -1.0])[:, None, None]

    other = generator.hypernet(Told(), generator.statistics)
    assert all(bool((a - b).abs().max() > 1e-4) for (a, _), (b, _) in zip(found.values(), other, strict=True))


def test_rows_of_memory_become_rows_of_factors(base: BaseModel, documents: list[str]) -> None:
    """Without blocks, A's first rows are the first numbers of the normalised states, in the units of the site."""
    generator = make_generator(base, hypernet="memory_tokens")
    hypernet = generator.hypernet
    assert isinstance(hypernet, MemoryTokens)
    hypernet.blocks = torch.nn.ModuleList()
    reading = generator.encoder.open([generator.encoder.tokenize(documents[0])])
    adapter = adapter_factors(hypernet.linears, hypernet.adapter_rank, hypernet.adapter_a, hypernet.adapter_b)
    states = reading.memory(hypernet.tokens, adapter, hypernet.layers)
    z = torch.nn.functional.rms_norm(states, (32,)) + hypernet.layer + hypernet.place
    for row, ((a, b), stat) in enumerate(
        zip(hypernet(reading, generator.statistics), generator.statistics, strict=True)
    ):
        numbers = hypernet.norm(z[0, row]).flatten()
        n, m = (part.view(3, 32) / 32**0.5 for part in numbers[: 3 * 64].split(3 * 32))
        torch.testing.assert_close(a[0] @ stat.moment.dense(), n * stat.moment.diagonal.sqrt(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(b[0].T * stat.gain / stat.residual_norm, 0.01 * m)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads .3. must divide width .32."),
        ({"depth": 3}, "depth .3. must be even"),
        ({"rank": 0}, "rank .0. must be at least 1"),
        ({"adapter_rank": 0}, "adapter_rank .0. must be at least 1"),
        ({"scale": -1.0}, "scale .-1.0. must be positive"),
    ],
)
def test_options_memory_tokens_cannot_use(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_generator(make_base(), "memory_tokens", options={**OPTIONS["memory_tokens"], **options})
