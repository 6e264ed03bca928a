from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig

from hyperlora.base_model import BaseModel
from hyperlora.layout import Layout, Stream, run_incremental, run_masked
from hyperlora.session import Session, takes_masks
from hyperlora.shared_state import SharedState
from hyperlora.structure import UnsupportedBase

from .conftest import make_base
from .layouts import compressed, gist, local, scattered, sentinel


def words(base: BaseModel, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, len(base.tokenizer), (count,), generator=generator).tolist()


def shared_state(base: BaseModel) -> SharedState:
    """New tokens and a gated adapter on every attention output or MLP that the generator would patch."""
    from hyperlora.structure import find_sites

    torch.manual_seed(3)
    adapter = {
        site.path: (torch.randn(1, 2, site.d_in) * 0.3, torch.randn(1, site.d_out, 2) * 0.3)
        for site in find_sites(base.model, [0, 2])
    }
    return SharedState("test", adapter=adapter, token_rows=torch.randn(3, 32), gated=True)


def layouts(base: BaseModel) -> dict[str, list[Layout]]:
    """A ragged batch of every kind."""
    new = base.model.get_input_embeddings().num_embeddings
    return {
        "plain": [Layout.plain(words(base, n, n)) for n in (30, 11)],
        "gist": [gist(words(base, n, n), n // 2, [new, new + 1][:k]) for n, k in ((31, 2), (12, 1), (20, 2))],
        "sentinel": [sentinel(words(base, n, n), a, b, new, new + 1) for n, a, b in ((30, 8, 20), (14, 2, 5))],
        "compressed": [
            compressed([words(base, n, n), words(base, n + 1, 7)], [new, new + 2][:k], words(base, 6, 9), recursive)
            for n, k, recursive in ((12, 2, True), (5, 1, False), (7, 2, True))
        ],
        "local": [local(words(base, n, n), 5) for n in (22, 9)],
        "scattered": [scattered(words(base, n, n), 0.6, n) for n in (24, 10)],
    }


KINDS = ["plain", "gist", "sentinel", "compressed", "local", "scattered"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_incremental_and_masked_execution_agree(any_base: BaseModel, kind: str) -> None:
    batch, shared = layouts(any_base)[kind], shared_state(any_base)
    alone = []
    for layout in batch:
        with Session(any_base, 1, shared=shared) as session:
            alone += run_masked(session, [layout])
    for side in ("left", "right"):
        with Session(any_base, len(batch), shared=shared) as session:
            masked = run_masked(session, batch, side)
        for one, other in zip(alone, masked, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with Session(any_base, len(batch), shared=shared) as session:
        for layout, one, other in zip(batch, alone, run_incremental(session, batch), strict=True):
            assert torch.isfinite(other).all() and len(other) == len(layout.targets)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        survivors = [int(layout.kept.sum()) for layout in batch]
    with Session(any_base, len(batch), shared=shared) as narrow:  # in pieces of a few tokens, whatever is freed
        ends = [len(layout.ids) for layout in batch]
        for one, other in zip(alone, Stream(narrow, len(batch), most=4).advance(batch, ends), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for used in (session, narrow):
        assert (used.places >= 0).sum(1).tolist() == survivors
        if kind != "plain":  # what is dropped is freed, not only masked
            assert used.kv_rows == max(survivors) < max(len(layout.ids) for layout in batch)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_gpu_frees_rows_as_the_cpu_does(base: BaseModel, kind: str) -> None:
    batch, shared = layouts(base)[kind], shared_state(base)
    with Session(base, len(batch), shared=shared) as session:
        expected = run_incremental(session, batch)
    base.model.to("cuda")
    adapter = {site: (a.cuda(), b.cuda()) for site, (a, b) in (shared.adapter or {}).items()}
    rows = None if shared.token_rows is None else shared.token_rows.cuda()
    with Session(base, len(batch), shared=replace(shared, adapter=adapter, token_rows=rows)) as session:
        found = run_incremental(session, batch)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_plain_layout_is_the_models_own_forward_pass(any_base: BaseModel) -> None:
    """Also beyond the sliding window of 16 that two of the bases have."""
    ids = words(any_base, 40, 0)
    with Session(any_base, 1) as session:
        (logits,) = run_masked(session, [Layout.plain(ids)])
    expected = any_base.model(torch.tensor([ids])).logits[0, :-1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_hidden_has_no_influence_and_what_is_seen_has() -> None:
    base = make_base()
    shared, ids = shared_state(base), words(base, 20, 1)
    new = base.model.get_input_embeddings().num_embeddings

    def last(context: list[int], gate: float = 1.0) -> torch.Tensor:
        layout = gist(context + ids[10:], 10, [new])
        layout.visible[10, :10] = gate > 0  # the gist itself reads the context or not
        with Session(base, 1, shared=shared) as session:
            return run_masked(session, [layout])[0][-1]

    other = [*ids[:9], ids[9] + 1]
    assert not torch.allclose(last(ids[:10]), last(other))  # through the gist
    torch.testing.assert_close(last(ids[:10], 0.0), last(other, 0.0))  # and through nothing else


@torch.no_grad()
def test_the_gate_confines_the_adapter() -> None:
    base = make_base()
    ids, shared = words(base, 12, 2), shared_state(base)
    plain = Layout.plain(ids)

    def logits(gate: torch.Tensor, state: SharedState | None) -> torch.Tensor:
        layout = Layout(plain.ids, plain.positions, plain.visible, plain.predicts, gate, plain.kept)
        with Session(base, 1, shared=state) as session:
            return run_masked(session, [layout])[0]

    bare, closed = logits(torch.zeros(12), None), logits(torch.zeros(12), shared)
    torch.testing.assert_close(closed, bare)
    half = torch.zeros(12)
    half[6:] = 1
    torch.testing.assert_close(logits(half, shared)[:6], bare[:6])
    assert not torch.allclose(logits(half, shared)[6:], bare[6:], atol=1e-2)


def test_the_masked_executor_trains_the_shared_state() -> None:
    base = make_base()
    shared = shared_state(base)
    assert shared.adapter is not None and shared.token_rows is not None
    trained = [shared.token_rows, *(t for pair in shared.adapter.values() for t in pair)]
    for tensor in trained:
        tensor.requires_grad_(True)
    new = base.model.get_input_embeddings().num_embeddings
    batch = [gist(words(base, n, n), n // 2, [new, new + 1, new + 2]) for n in (16, 9)]
    with Session(base, 2, shared=shared, cached=False) as session:
        logits = torch.cat(run_masked(session, batch))
        torch.nn.functional.cross_entropy(logits, torch.cat([layout.targets for layout in batch])).backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in trained)


@torch.no_grad()
def test_tokens_inserted_while_decoding_match_the_masked_layout() -> None:
    """Every fourth token a COMP is fed with the gate on and the K/V of its chunk are dropped; the sequence that comes
    out, run as one masked layout, gives the same logits."""
    base = make_base()
    shared, stream, comp = shared_state(base), words(base, 12, 5), base.model.get_input_embeddings().num_embeddings
    seen: list[torch.Tensor] = []
    with Session(base, 1, shared=shared) as session:
        place = 0

        def feed(token: int, position: int, gate: float) -> torch.Tensor:
            nonlocal place
            where, on = torch.tensor([[place]]), torch.ones(1, 1, dtype=torch.bool)
            place += 1
            scale = torch.full((1, 1), gate)
            return session.feed(torch.tensor([[token]]), where, torch.tensor([[position]]), on, gate=scale)

        for index, token in enumerate(stream):
            seen.append(feed(token, index, 0.0)[0])
            if index % 4 == 3 and index + 1 < len(stream):
                feed(comp, index + 1, 1.0)
                session.keep(session.places % 5 == 4)
        assert session.kv_rows == 2 + 4
    layout = compressed([stream[:4], stream[4:8]], [comp], stream[8:])
    with Session(base, 1, shared=shared) as session:
        (masked,) = run_masked(session, [layout])
    torch.testing.assert_close(torch.stack(seen[8:-1]), masked, rtol=1e-4, atol=1e-4)


def test_a_base_that_takes_no_positions_is_refused(base: BaseModel) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_attention_heads": 4}
    falcon = FalconConfig(**sizes, num_hidden_layers=2, alibi=True)
    for config in (BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4), falcon):
        alibi = BaseModel("alibi", AutoModelForCausalLM.from_config(config), base.tokenizer)
        assert not takes_masks(alibi)
        with pytest.raises(UnsupportedBase, match=f"{config.model_type} cannot be told the positions"):
            Session(alibi, 1)


def test_impossible_layouts_are_refused() -> None:
    assert len(Layout.plain([]).freed_after) == 0
    plain = Layout.plain([5, 6, 7])
    with pytest.raises(ValueError, match="negative"):
        Layout(plain.ids, torch.tensor([0, 1, -1]), plain.visible, plain.predicts, plain.gate, plain.kept)
    with pytest.raises(ValueError, match="come after"):
        Layout(plain.ids, plain.positions, plain.visible, torch.tensor([0, -1, -1]), plain.gate, plain.kept)
    with pytest.raises(ValueError, match="layout of 3"):
        Layout(plain.ids, plain.positions[:2], plain.visible, plain.predicts, plain.gate, plain.kept)
