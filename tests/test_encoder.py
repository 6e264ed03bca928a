from itertools import chain

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.encoder import Encoder
from hyperlora.errors import InputError
from hyperlora.structure import find_sites


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


def test_chunks_cover_the_document_and_batches_stay_small(base: BaseModel) -> None:
    encoder = Encoder(base, find_sites(base.model, [1]), chunk_tokens=7, batch_tokens=20)
    ids = list(range(30))
    chunks = encoder.chunks(ids)
    assert list(chain(*chunks)) == ids and max(map(len, chunks)) <= 7
    batches = list(encoder.batches(chunks))
    assert list(chain(*chain(*batches))) == ids and all(len(b) * max(map(len, b)) <= 20 for b in batches)


@pytest.mark.parametrize("text", ["", "a"])
def test_documents_too_short_are_refused(base: BaseModel, text: str) -> None:
    with pytest.raises(InputError, match="at least two"):
        Encoder(base, find_sites(base.model, [1])).tokenize(text)
