"""Find what a patch needs in any causal language model, by its structure and config, never by a class or a name."""

import inspect
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperlora.errors import HyperloraError

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class UnsupportedBase(HyperloraError):
    """The base model has a structure that patches cannot be made for."""

    code = 5


@dataclass(frozen=True)
class Site:
    """One linear module that a patch changes: `path` as in `model.get_submodule`, 0-based `layer`, and its widths."""

    path: str
    layer: int
    d_in: int
    d_out: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def text_config(model: nn.Module) -> Any:
    """The part of the config that describes the decoder (multimodal configs nest it)."""
    return model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]


def context_window(model: nn.Module) -> int:
    """Longest sequence in tokens that the model reads; no bound where its positions have none, as with ALiBi."""
    config = text_config(model)
    names = ("max_position_embeddings", "max_seq_len")
    return next((found for name in names if (found := getattr(config, name, None))), sys.maxsize)


def check_embeds(model: nn.Module) -> None:
    """Raises UnsupportedBase where the layers look up token ids themselves (Gemma 4), which inserted or cached tokens
    do not have."""
    config = text_config(model)
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise UnsupportedBase(
            f"{config.model_type} looks up token ids in every layer; comparisons and memory tokens need a base that "
            "reads embeddings alone"
        )


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the outermost `ModuleList` as long as the config's layer count."""
    count = text_config(model).num_hidden_layers
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise UnsupportedBase(f"no stack of {count} decoder layers found in {type(model).__name__}; use a causal LM")
    return min(found, key=lambda item: item[0].count("."))


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer puts out, which some models give with other things in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(d_in, d_out)` of a linear-like module (`nn.Linear`, its quantised forms, transposed `Conv1D`), else None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if is_transposed(module):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return None


def is_transposed(module: nn.Module) -> bool:
    """True for a linear that stores its weight as (d_in, d_out), which PEFT calls `fan_in_fan_out`."""
    return hasattr(module, "nx") and hasattr(module, "nf")


def _reads_attention(module: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(module.forward).parameters


def find_sites(model: nn.Module, layers: list[int] | None = None, modules: list[str] | None = None) -> list[Site]:
    """The linear modules to patch, in layer order.

    Args:
        layers: 0-based layer numbers; None takes all.
        modules: paths inside a layer or their endings (`"mlp.down_proj"`, `"o_proj"`). None takes the module that
            writes the MLP's output into the residual stream, found by shape.

    Raises:
        UnsupportedBase: no attention or no single MLP output in a layer (recurrent and mixture-of-experts models).
    """
    stack, blocks = decoder_layers(model)
    layers = _checked(model, range(len(blocks)) if layers is None else layers)
    sites = []
    for layer in layers:
        for name in _site_names(blocks[layer], text_config(model).hidden_size, modules):
            shape = linear_shape(blocks[layer].get_submodule(name))
            assert shape is not None
            sites.append(Site(f"{stack}.{layer}.{name}", layer, *shape))
    return sites


def _checked(model: nn.Module, layers: Iterable[int]) -> list[int]:
    """The layers. Raises UnsupportedBase where there are none of these, or the base is of a kind without patches."""
    config, layers = text_config(model), list(layers)
    mixers = set(getattr(config, "layer_types", None) or getattr(config, "block_types", None) or ())
    if any("attention" not in mixer or "linear" in mixer for mixer in mixers):
        kinds = ", ".join(sorted(mixers))
        raise UnsupportedBase(f"{config.model_type} has layers of kind {kinds}: recurrent bases cannot be patched")
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERT_KEYS):
        raise UnsupportedBase(f"{config.model_type} is a mixture of experts; patches need a dense base model")
    words, width = model.get_output_embeddings(), config.hidden_size  # type: ignore[operator]
    if words is not None and words.weight.shape[-1] != width:
        raise UnsupportedBase(
            f"{config.model_type}'s output layer reads {words.weight.shape[-1]} channels and its layers write {width}; "
            "patches need a base without a projection between them"
        )
    count = len(decoder_layers(model)[1])
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        raise UnsupportedBase(f"layer {wrong[0]} does not exist: this base has layers 0 to {count - 1}")
    return layers


def attention_outputs(model: nn.Module, layers: Iterable[int]) -> list[Site]:
    """The module of each layer's attention that writes into the residual stream: the last of that width.

    Raises:
        UnsupportedBase: a layer without attention (recurrent models), a mixture of experts.
    """
    hidden, sites = text_config(model).hidden_size, []
    for layer in _checked(model, layers):
        writing = [site for site in attention_linears(model, [layer]) if site.d_out == hidden]
        if not writing:
            raise UnsupportedBase(f"layer {layer} has no attention that writes into the residual stream")
        sites.append(writing[-1])
    return sites


def attention_linears(model: nn.Module, layers: Iterable[int]) -> list[Site]:
    """All linear modules inside the attention of some layers."""
    (stack, blocks), layers = decoder_layers(model), list(layers)
    attention = tuple(
        f"{stack}.{layer}.{name}."
        for layer in layers
        for name, child in blocks[layer].named_children()
        if _reads_attention(child)
    )
    return [site for site in linears(model, layers) if site.path.startswith(attention)]


def linears(model: nn.Module, layers: Iterable[int]) -> list[Site]:
    """All linear modules of some layers."""
    stack, blocks = decoder_layers(model)
    return [
        Site(f"{stack}.{layer}.{name}", layer, *shape)
        for layer in layers
        for name, module in blocks[layer].named_modules()
        if (shape := linear_shape(module)) is not None
    ]


def _site_names(block: nn.Module, hidden: int, modules: list[str] | None) -> list[str]:
    linears = {n: s for n, m in block.named_modules() if (s := linear_shape(m)) is not None}
    if modules is not None:
        names = [n for n in linears if any(n == want or n.endswith(f".{want}") for want in modules)]
        if not all(any(n == want or n.endswith(f".{want}") for n in linears) for want in modules):
            raise UnsupportedBase(f"target modules {modules} not all found in a layer; it has {', '.join(linears)}")
        return names
    attention = [n for n, child in block.named_children() if _reads_attention(child)]
    outputs = [n for n, (_, out) in linears.items() if out == hidden and n.split(".")[0] not in attention]
    if not attention or not outputs:
        raise UnsupportedBase("a layer has no attention with an MLP after it: recurrent bases cannot be patched")
    # A square MLP input would also write `hidden`; the output projection is the one that is registered last.
    if len({name.rpartition(".")[0] for name in outputs}) != 1:
        raise UnsupportedBase(f"expected one MLP output per layer, found {outputs}; name the target modules")
    return outputs[-1:]


def residual_gain(block: nn.Module, site: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """How much of a change of `site`'s output arrives in the residual stream, per channel, by perturbing it.

    Exactly one for an MLP's output in a plain pre-norm block, near one for attention's, which the layer's MLP reads
    too; a post-norm (Gemma 3) or a residual multiplier scales it. `args` and `kwargs` are what the block was called
    with and `output` (batch, tokens, d_out) what it returned.
    The first token, an attention sink, is left out. Returns (d_out,) in float32.

    Raises:
        UnsupportedBase: the layer has more than one stream, or does not run the site.
    """
    if output.dim() != 3:
        raise UnsupportedBase("the layers write several streams side by side (Gemma 3n); patches need a base with one")
    moves: list[Tensor] = []

    def perturb(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        size = 0.1 * out.float().pow(2).mean(-1, keepdim=True).sqrt().expand_as(out)
        # As large as the stream's own rounding at least, else a half-precision stream would not move.
        size = torch.maximum(size, 8 * torch.finfo(out.dtype).eps * output.float().abs())
        moved_out = (out.float() + size * (torch.randint_like(size, 0, 2) * 2 - 1)).to(out.dtype)
        moves.append(moved_out.float() - out.float())
        return moved_out

    handle = site.register_forward_hook(perturb)
    try:
        moved = block.forward(*args, **kwargs)
    finally:
        handle.remove()
    if not moves:
        raise UnsupportedBase("a module that was to be patched is not run by its layer; name others as `modules`")
    moved = moved[0] if isinstance(moved, tuple) else moved
    change = (moved.float() - output.float()) / moves[0]  # (batch, tokens, d_out)
    return change[:, 1:].flatten(0, -2).median(dim=0).values
