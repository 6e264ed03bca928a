from itertools import chain, pairwise

import pytest
import torch

from hyperlora.base_model import BaseModel, load_base
from hyperlora.encoder import Encoder
from hyperlora.errors import InputError
from hyperlora.structure import decoder_layers, find_sites, is_transposed, linears


def test_features_are_the_models_own(any_base: BaseModel, documents: list[str]) -> None:
    encoder = Encoder(any_base, find_sites(any_base.model, [1, 3]))
    ids = encoder.tokenize(documents[0])
    features = encoder.read([ids])
    seen: list[torch.Tensor] = []
    module = any_base.model.get_submodule(encoder.sites[1].path)
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    whole = any_base.model(torch.tensor([encoder.sink + ids]), output_hidden_states=True)
    handle.remove()
    torch.testing.assert_close(features.inputs[1], seen[0][:, 1:], rtol=1e-5, atol=1e-5)
    for place, layer in enumerate((0, 1)):
        torch.testing.assert_close(features.hidden[:, :, place], whole.hidden_states[layer][:, 1:])
    table = torch.nn.functional.normalize(any_base.model.get_output_embeddings().weight, dim=-1)
    torch.testing.assert_close(features.following[0, :-1], table[torch.tensor(ids[1:])])
    assert not features.following[0, -1].any()


def test_padding_and_company_change_nothing(any_base: BaseModel, documents: list[str]) -> None:
    encoder = Encoder(any_base, find_sites(any_base.model, [1, 3]))
    ids = [encoder.tokenize(text) for text in documents]
    together = encoder.read(ids)
    for row, own in enumerate(ids):
        alone = encoder.read([own])
        assert together.mask[row].sum() == len(own)
        for joint, single in zip(together.inputs, alone.inputs, strict=True):
            torch.testing.assert_close(joint[row, : len(own)], single[0], rtol=1e-4, atol=1e-5)


def test_packed_chunks_are_read_as_padded_ones(any_base: BaseModel, documents: list[str]) -> None:
    """As with flash-attention: ragged chunks in one sequence, also with memory tokens and in a sliding window."""
    sites = find_sites(any_base.model, [1, 3])
    padded, packed = Encoder(any_base, sites), Encoder(any_base, sites)
    packed.packed = True
    ids = [padded.tokenize(text) for text in (documents[0], documents[1][:30], documents[2])]
    widths: list[tuple[int, ...]] = []
    handle = any_base.model.get_submodule(sites[0].path).register_forward_pre_hook(
        lambda m, args: widths.append(tuple(args[0].shape[:2]))
    )
    one, other = padded.read(ids), packed.read(ids)
    handle.remove()
    assert widths == [(3, 1 + max(map(len, ids))), (1, 3 + sum(map(len, ids)))]
    mask = one.mask[..., None]
    for name in ("words", "following"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(one.hidden * mask[..., None], other.hidden * mask[..., None], rtol=1e-4, atol=1e-4)
    for x, y in zip(one.inputs, other.inputs, strict=True):
        torch.testing.assert_close(x * mask, y * mask, rtol=1e-4, atol=1e-4)
    tokens = torch.randn(3, 32, requires_grad=True)
    found = [encoder.memory(ids, tokens, {}, [1, 3]) for encoder in (padded, packed)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    slopes = [torch.autograd.grad(states.square().sum(), tokens)[0] for states in found]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("apart", [True, False])
def test_a_base_that_mixes_packed_chunks_reads_padded_ones(base: BaseModel, documents: list[str], apart: bool) -> None:
    """Under flash-attention some lose the positions that tell chunks apart."""
    sites, inner = find_sites(base.model, [1, 3]), base.model.base_model
    forward = inner.forward
    if not apart:
        inner.forward = lambda position_ids=None, **inputs: forward(**inputs)
    padded, packed = Encoder(base, sites), Encoder(base, sites)
    packed.packed = True
    ids = [padded.tokenize(text) for text in (documents[0], documents[1][:30])]
    one, other = padded.read(ids), packed.read(ids)
    mask = one.mask[..., None, None]
    torch.testing.assert_close(one.hidden * mask, other.hidden * mask, rtol=1e-4, atol=1e-4)
    assert packed._tells_apart == apart


@pytest.mark.gpu
def test_flash_attention_reads_as_sdpa_does(documents: list[str]) -> None:
    """Ragged chunks of a real base in bfloat16."""
    pytest.importorskip("flash_attn")
    flash = load_base(dtype=torch.bfloat16, device="cuda")
    assert flash.attention == "flash_attention_2"
    sites = find_sites(flash.model, [10, 20])
    ids = [Encoder(flash, sites).tokenize(text) for text in (documents[0] * 9, documents[1], documents[2] * 3)]
    packed = Encoder(flash, sites).read(ids)
    flash.model.set_attn_implementation("sdpa")
    padded = Encoder(flash, sites).read(ids)
    mask = padded.mask[..., None]
    for x, y in zip(packed.inputs, padded.inputs, strict=True):
        assert ((x - y) * mask).norm() < 0.03 * (y * mask).norm()


def test_memory_tokens_stand_behind_each_chunk(any_base: BaseModel, documents: list[str]) -> None:
    """Ragged chunks together are what merged weights make of each, fed as embeddings with the tokens at its end."""
    encoder = Encoder(any_base, find_sites(any_base.model, [1, 3]))
    ids = [encoder.tokenize(text) for text in (documents[0], documents[1][:40])]
    tokens = torch.randn(3, 32)
    sites = linears(any_base.model, range(4))
    assert len({site.path for site in sites}) == len(sites) >= 16
    adapter = {s.path: (torch.randn(1, 2, s.d_in) / 8, torch.randn(1, s.d_out, 2) / 8) for s in sites}
    found = encoder.open(ids).memory(tokens, adapter, [1, 3])
    assert found.shape == (2, 2, 3, 32)
    for site in sites:
        module = any_base.model.get_submodule(site.path)
        delta = (adapter[site.path][1] @ adapter[site.path][0])[0]
        module.weight.data += delta.T if is_transposed(module) else delta
    behind: list[torch.Tensor] = []
    handles = [
        decoder_layers(any_base.model)[1][layer].register_forward_hook(
            lambda m, args, out: behind.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in (1, 3)
    ]
    for row, own in enumerate(ids):
        embeds = any_base.model.get_input_embeddings()(torch.tensor([encoder.sink + own]))
        size = embeds[:, len(encoder.sink) :].square().mean().sqrt()
        behind.clear()
        any_base.model.base_model(inputs_embeds=torch.cat([embeds, (size * tokens)[None]], dim=1), use_cache=False)
        for place, states in enumerate(behind):
            torch.testing.assert_close(found[row, place], states[0, -3:], rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_base.model.modules())


def test_early_exit_skips_the_rest_and_leaves_no_hook(base: BaseModel, documents: list[str]) -> None:
    encoder = Encoder(base, find_sites(base.model, [1]))
    calls: list[int] = []
    handles = [
        layer.register_forward_hook(lambda m, args, out, i=i: calls.append(i))
        for i, layer in enumerate(base.model.model.layers)
    ]
    encoder.read([encoder.tokenize(documents[0])])
    assert calls == [0, 1]
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


@pytest.mark.parametrize(("longest", "tokens"), [(7, 30), (16, 17), (16, 28), (300, 1000), (300, 537)])
def test_chunks_cover_the_document_and_batches_stay_small(base: BaseModel, longest: int, tokens: int) -> None:
    encoder = Encoder(base, find_sites(base.model, [1]), chunk_tokens=longest, batch_tokens=3 * longest)
    ids = list(range(tokens))
    chunks = encoder.chunks(ids)
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) <= longest and max(sizes) - min(sizes) <= 1
    repeated = encoder.overlap
    assert 0 < repeated <= min(64, longest // 4)
    assert (len(chunks) - 1) * (longest - repeated) + repeated < tokens  # no fewer would do
    assert list(chain(chunks[0], *(chunk[repeated:] for chunk in chunks[1:]))) == ids
    assert all(before[-repeated:] == behind[:repeated] for before, behind in pairwise(chunks))
    batches = [[chunks[number] for number in numbers] for numbers in encoder.batches(chunks)]
    assert sorted(chain(*batches)) == sorted(chunks)
    assert all(len(b) * max(map(len, b)) <= 3 * longest for b in batches)


def test_a_document_of_one_chunk_is_whole(base: BaseModel) -> None:
    assert Encoder(base, find_sites(base.model, [1]), chunk_tokens=30).chunks(list(range(30))) == [list(range(30))]


@pytest.mark.parametrize("text", ["", "a"])
def test_documents_too_short_are_refused(base: BaseModel, text: str) -> None:
    with pytest.raises(InputError, match="at least two"):
        Encoder(base, find_sites(base.model, [1])).tokenize(text)
