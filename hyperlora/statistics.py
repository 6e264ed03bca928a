"""What is known of a site over generic text: its inputs' second moment, the residual's size, the gain of its output.

The second moment C = E[x x^T] whitens keys and weighs the rank cap. It is stored as a diagonal plus a few directions,
C = diag(d) + U diag(s) U^T, so that it stays small for wide models; the Woodbury identity gives its inverse.
"""

from collections.abc import Iterable
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from hyperlora.base_model import BaseModel
from hyperlora.structure import Site, decoder_layers, hidden_of, residual_gain


class SecondMoment(nn.Module):
    """C = diag(`diagonal`) + `basis` diag(`weight`) `basis`^T, positive definite, in float32.

    Buffers: diagonal (d_in,), basis (d_in, directions), weight (directions,).
    """

    diagonal: Tensor
    basis: Tensor
    weight: Tensor

    def __init__(self, d_in: int, directions: int):
        super().__init__()
        directions = min(directions, d_in)
        self.register_buffer("diagonal", torch.ones(d_in))
        self.register_buffer("basis", torch.zeros(d_in, directions))
        self.register_buffer("weight", torch.zeros(directions))

    @torch.no_grad()
    def fit(self, moment: Tensor, ridge: float) -> None:
        """Approximate `moment` (d_in, d_in) by its leading directions and the diagonal of the rest, plus a ridge
        (a fraction of the mean diagonal)."""
        k = self.weight.numel()
        values, vectors = torch.linalg.eigh(moment.double())
        values = values.clamp_min(1e-12 * float(values[-1]))  # rounding makes some negative
        self.weight.copy_(values[-k:] if k else values[:0])
        self.basis.copy_(vectors[:, -k:] if k else vectors[:, :0])
        rest = moment.diagonal() - (self.basis.square() @ self.weight)
        self.diagonal.copy_(rest.clamp_min(0) + ridge * moment.diagonal().mean())

    def solve(self, x: Tensor) -> Tensor:
        """C^-1 x for x (..., tokens, d_in), by the Woodbury identity in float32."""
        y = x.float() / self.diagonal
        if not self.weight.numel():
            return y
        scaled = self.basis / self.diagonal[:, None]  # (d_in, directions)
        core = torch.diag(1 / self.weight) + self.basis.T @ scaled  # (directions, directions), symmetric
        return y - (y @ self.basis) @ torch.linalg.solve(core, scaled.T)

    def spread(self) -> Tensor:
        """The root mean square of every channel (d_in,): C's diagonal, to the power of a half."""
        return (self.diagonal + self.basis.square() @ self.weight).sqrt()

    def factor(self, a: Tensor) -> Tensor:
        """F (..., rows, d_in + directions) with F F^T = a C a^T, for a (..., rows, d_in)."""
        return torch.cat([a * self.diagonal.sqrt(), (a @ self.basis) * self.weight.sqrt()], dim=-1)

    def dense(self) -> Tensor:
        """C itself (d_in, d_in)."""
        return torch.diag(self.diagonal) + (self.basis * self.weight) @ self.basis.T


class SiteStatistics(nn.Module):
    """Calibration of one site. Buffers besides the second moment: `gain` (d_out,), what a change of the output is
    worth in the residual stream, and `residual_norm` (), the size of the stream after the site's layer: the norm it
    would have if all its channels were like the median one. A few channels are many times larger than the rest,
    above all in Gemma 3, and values as large as those drown everything else."""

    gain: Tensor
    residual_norm: Tensor

    def __init__(self, site: Site, directions: int):
        super().__init__()
        self.moment = SecondMoment(site.d_in, directions)
        self.register_buffer("gain", torch.ones(site.d_out))
        self.register_buffer("residual_norm", torch.ones(()))


@torch.no_grad()
def calibrate(
    base: BaseModel, sites: list[Site], statistics: Iterable[SiteStatistics], texts: list[list[int]], ridge: float
) -> None:
    """Measure `statistics` (one per site) while the base reads `texts`, token ids of at least two tokens each.

    The first token of a text is left out: models use it as an attention sink with untypical activations.
    """
    _, blocks = decoder_layers(base.model)
    moments = [torch.zeros(site.d_in, site.d_in, device=base.device) for site in sites]
    gains: list[list[Tensor]] = [[] for _ in sites]
    norms: list[list[Tensor]] = [[] for _ in sites]
    probing: list[bool] = []  # non-empty while a layer runs a second time to measure its gain
    handles = []

    def watch(index: int, site: Site) -> None:
        module = base.model.get_submodule(site.path)

        def after_site(_: nn.Module, args: tuple, __: Any) -> None:
            if not probing:
                x = rearrange(args[0][:, 1:].float(), "batch tokens width -> (batch tokens) width")
                moments[index] += einsum(x, x, "tokens i, tokens j -> i j")

        def after_layer(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = hidden_of(output)
            # Of Gaussian channels half lie within 0.6745 standard deviations.
            typical = hidden[:, 1:].float().abs().median(dim=-1).values / 0.6745
            norms[index].append(typical.flatten() * hidden.shape[-1] ** 0.5)
            probing.append(True)
            gains[index].append(residual_gain(block, module, args, kwargs, hidden))
            probing.clear()

        handles.append(module.register_forward_hook(after_site))
        handles.append(blocks[site.layer].register_forward_hook(after_layer, with_kwargs=True))

    for index, site in enumerate(sites):
        watch(index, site)
    try:
        for ids in texts:
            base.model.base_model(input_ids=torch.tensor([ids], device=base.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(ids) - 1 for ids in texts)
    for index, stat in enumerate(statistics):
        stat.moment.fit(moments[index] / tokens, ridge)
        gain = torch.stack(gains[index]).mean(0)
        # A channel that a norm all but silences would need huge values; leave it out of reach instead.
        stat.gain.copy_(gain.clamp_min(0.05 * float(gain.median())))
        stat.residual_norm.copy_(torch.cat(norms[index]).median())
