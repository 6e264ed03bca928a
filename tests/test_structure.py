import sys
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
)

from hyperlora.base_model import BaseModel
from hyperlora.session import Session, takes_masks
from hyperlora.structure import UnsupportedBase, attention_outputs, context_window, find_sites, is_transposed

from .conftest import TEXT, make_base, make_generator, make_tokenizer

OUTPUTS = {
    "llama": "model.layers.2.mlp.down_proj",
    "qwen3": "model.layers.2.mlp.down_proj",
    "gemma3": "model.layers.2.mlp.down_proj",
    "mistral": "model.layers.2.mlp.down_proj",
    "phi3": "model.layers.2.mlp.down_proj",
    "gpt2": "transformer.h.2.mlp.c_proj",
}


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (GPT2Config(vocab_size=400, n_embd=32, n_layer=4, n_head=4, n_positions=100), 100),
        (MptConfig(vocab_size=400, d_model=32, n_layers=4, n_heads=4, max_seq_len=90), 90),
        (BloomConfig(vocab_size=400, hidden_size=32, n_layer=4, n_head=4), sys.maxsize),
    ],
    ids=lambda found: getattr(found, "model_type", str(found)),
)
def test_positions_may_have_a_bound_or_none(config: PretrainedConfig, window: int) -> None:
    """ALiBi has none; a generator reads and patches such bases as well."""
    base = BaseModel("alibi", AutoModelForCausalLM.from_config(config), make_tokenizer())
    assert context_window(base.model) == window
    patch, ids = make_generator(base).generate(TEXT), torch.tensor([[5, 6, 7]])
    bare = base.model(ids).logits
    patch.merge(base.model)
    assert (base.model(ids).logits - bare).abs().max() > 1e-3


def test_mlp_output_is_found_by_structure(any_base: BaseModel) -> None:
    site = find_sites(any_base.model, [2])[0]
    assert site.path == OUTPUTS[any_base.name.removeprefix("tiny-")]
    assert (site.d_in, site.d_out) == ((128, 32) if "gpt2" in any_base.name else (48, 32))
    assert is_transposed(any_base.model.get_submodule(site.path)) == ("gpt2" in any_base.name)


def test_the_attention_output_is_what_the_attention_returns(any_base: BaseModel) -> None:
    (site,) = attention_outputs(any_base.model, [2])
    module = any_base.model.get_submodule(site.path)
    attention = any_base.model.get_submodule(site.path.rpartition(".")[0])
    found: dict[str, Any] = {}
    for name, one in (("module", module), ("attention", attention)):
        one.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
    any_base.model(torch.tensor([[5, 6, 7]]))
    assert torch.equal(found["module"], found["attention"][0])
    assert site.layer == 2 and found["module"].shape[-1] == site.d_out == 32


def test_modules_can_be_named_by_the_end_of_their_path() -> None:
    model = make_base().model
    sites = find_sites(model, [0, 3], ["o_proj", "mlp.down_proj"])
    assert [s.path.split(".", 2)[2] for s in sites] == [
        "0.self_attn.o_proj", "0.mlp.down_proj", "3.self_attn.o_proj", "3.mlp.down_proj",
    ]  # fmt: skip
    with pytest.raises(UnsupportedBase, match="not all found"):
        find_sites(model, [0], ["no_such_proj"])
    with pytest.raises(UnsupportedBase, match="not all found"):
        find_sites(make_base("gpt2").model, [0], ["c_proj", "no_such_proj"])  # the first of which is there twice
    with pytest.raises(UnsupportedBase, match="layers 0 to 3"):
        find_sites(model, [4])


def test_experts_and_recurrent_models_are_refused() -> None:
    experts = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedBase, match="mixture of experts"):
        find_sites(AutoModelForCausalLM.from_config(experts))
    with pytest.raises(UnsupportedBase, match="mixture of experts"):
        attention_outputs(AutoModelForCausalLM.from_config(experts), [0])
    recurrent = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedBase, match="recurrent"):
        find_sites(AutoModelForCausalLM.from_config(recurrent))
    with pytest.raises(UnsupportedBase, match="recurrent"):
        attention_outputs(AutoModelForCausalLM.from_config(recurrent), [0])


SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False), "reads 16 channels"),
        (
            BartConfig(vocab_size=400, d_model=32, encoder_layers=4, decoder_layers=4, decoder_attention_heads=4),
            "is not run by its layer",
        ),
        (
            Gemma3nTextConfig(
                **SIZES,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=[64] * 4,
                num_kv_shared_layers=0,
                layer_types=["full_attention"] * 4,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=400,
                laurel_rank=4,
                activation_sparsity_pattern=[0.0] * 4,
            ),
            "several streams",
        ),
    ],
    ids=["opt-350m", "bart", "gemma-3n"],
)
def test_shapes_that_patches_do_not_fit_are_refused(config: PretrainedConfig, message: str) -> None:
    base = BaseModel("odd", AutoModelForCausalLM.from_config(config), make_tokenizer())
    with pytest.raises(UnsupportedBase, match=message):
        make_generator(base)


def test_layers_that_look_up_token_ids_read_documents_but_no_memory_tokens() -> None:
    config = Gemma4TextConfig(**SIZES, num_key_value_heads=2, head_dim=8, intermediate_size=64)
    base = BaseModel("gemma4", AutoModelForCausalLM.from_config(config), make_tokenizer())
    generator = make_generator(base)
    assert generator.generate(TEXT).rank == generator.config.rank and not takes_masks(base)
    with pytest.raises(UnsupportedBase, match="reads embeddings alone"):
        make_generator(base, "memory_tokens").generate(TEXT)
    with pytest.raises(UnsupportedBase, match="reads embeddings alone"):
        Session(base, 1)


def test_gain_is_one_without_and_measured_with_a_post_norm() -> None:
    for statistic in make_generator(make_base("llama"), modules=["down_proj"]).statistics:
        torch.testing.assert_close(statistic.gain, torch.ones_like(statistic.gain), atol=1e-3, rtol=0)
    for statistic in make_generator(make_base("llama")).statistics:  # attention's outputs, which the MLP reads too
        torch.testing.assert_close(statistic.gain, torch.ones_like(statistic.gain), atol=0.2, rtol=0)
    base = make_base("gemma3")
    base.model.model.layers[3].post_feedforward_layernorm.weight.data.fill_(1.0)  # Gemma adds one: a gain of two
    halved = make_generator(base, modules=["mlp.down_proj"]).statistics[1].gain.clone()
    base.model.model.layers[3].post_feedforward_layernorm.weight.data.fill_(3.0)
    doubled = make_generator(base, modules=["mlp.down_proj"]).statistics[1].gain
    assert torch.allclose(doubled / halved, torch.tensor(2.0), rtol=0.1)
