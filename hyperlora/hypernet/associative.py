"""An associative memory written into the weights: one or two (key, value) slots per document token and site.

Keys follow the closed-form model editors (ROME, Meng et al. 2022, arXiv 2202.05262; MEMIT, arXiv 2210.07229): for
module inputs X (tokens, d_in) at the document's tokens, values V and the second moment C of generic text, the update
that minimises |V - X W|^2 + ridge * tr(W^T C W) is W = K^T V with keys K = (X C^-1 X^T + ridge)^-1 X C^-1. Each key
answers to its own token, little to the document's other tokens, and hardly to unrelated text. Values are directions
of the residual stream that raise a token's logit, plus a learned part. Untrained, the copy slots already store
much of the document (eval/bench/keys.py measures it); training adjusts what is stored, how strongly and under which
key.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.errors import InputError
from hyperlora.hypernet.contract import Factors, Features, Hypernet
from hyperlora.statistics import SecondMoment, SiteStatistics
from hyperlora.structure import Site


class Associative(Hypernet):
    """Copy slots and pointer slots over a small bidirectional transformer.

    For site input x_t, hidden state z_t of the small transformer, unit unembedding e, residual norm |h| and gate g:

    - copy: keys from x_t, values g |h| (c * e(t+1) + W z_t): after t comes t+1.
    - pointer: keys from W_k z_t, values g' |h| (c' * e(t) + W' z_t): a place predicted from the document, such as
      the end of a question, selects t.

    Args:
        sites: the modules to write to; each writes into the residual stream (d_out = `d_model`).
        width, depth, heads: of the transformer behind z.
        copy_scale, pointer_scale: initial c and c'.
        pointer: whether to add pointer slots.
        ridge: initial ridge of the keys, in units of E[x^T C^-1 x] = d_in; learned per site.
    """

    def __init__(
        self,
        sites: list[Site],
        d_model: int,
        *,
        width: int = 320,
        depth: int = 2,
        heads: int = 5,
        pointer: bool = True,
        copy_scale: float = 0.15,
        pointer_scale: float = 0.02,
        ridge: float = 1.0,
    ):
        super().__init__()
        wrong = [site.path for site in sites if site.d_out != d_model]
        if wrong:
            raise InputError(f"the associative generator writes to the residual stream; {wrong[0]} does not")
        if width % heads:
            raise InputError(f"options of the hypernet associative: heads ({heads}) must divide width ({width})")
        self.mix = nn.Linear(4 * d_model, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.copy = nn.ModuleList(_Value(width, d_model, copy_scale, gate_bias=2.0) for _ in sites)
        self.point = nn.ModuleList(_Value(width, d_model, pointer_scale, gate_bias=-2.0) for _ in sites if pointer)
        self.aim = nn.ModuleList(nn.Linear(width, site.d_in) for site in sites if pointer)
        self.log_ridge = nn.Parameter(torch.full((len(sites), 2), math.log(ridge)))

    def forward(self, features: Features, statistics: Sequence[SiteStatistics]) -> list[Factors]:
        z = self._read(features)
        factors = []
        for index, (x, stat) in enumerate(zip(features.inputs, statistics, strict=True)):
            ridge, mask = self.log_ridge[index].exp(), features.mask[..., None]
            keys = [competing_keys(x * mask, stat.moment, ridge[0])]
            values = [self.copy[index](z, features.following)]
            if len(self.aim):
                aim = self.aim[index](z) * mask
                size = (stat.moment.solve(aim) * aim).sum(-1, keepdim=True).clamp_min(1e-6)
                keys.append(competing_keys(aim * (aim.shape[-1] / size).sqrt(), stat.moment, ridge[1]))
                values.append(self.point[index](z, features.words))
            a = torch.cat(keys, dim=1)  # (documents, slots, d_in)
            b = torch.cat([value * mask for value in values], dim=1) * (stat.residual_norm / stat.gain)
            factors.append((a, rearrange(b, "documents slots d_out -> documents d_out slots")))
        return factors

    def _read(self, features: Features) -> Tensor:
        """z (documents, tokens, width)."""
        hidden = F.rms_norm(features.hidden, features.hidden.shape[-1:])
        # The next token's embedding: what a copy slot stores, which causal hidden states cannot know.
        following = F.pad(hidden[:, 1:, 0] * features.mask[:, 1:, None], (0, 0, 0, 1))
        z = self.mix(torch.cat([rearrange(hidden, "b t k d -> b t (k d)"), following], dim=-1))
        for block in self.blocks:
            z = block(z, features.mask)
        return self.norm(z)


def competing_keys(x: Tensor, moment: SecondMoment, ridge: Tensor) -> Tensor:
    """(x C^-1 x^T + ridge * d_in)^-1 x C^-1 for x (documents, tokens, d_in), zero in padded rows; same shape."""
    toward = moment.solve(x)
    gram = toward @ x.mT  # (documents, tokens, tokens)
    gram = gram + ridge * x.shape[-1] * torch.eye(x.shape[1], device=x.device)
    return torch.cholesky_solve(toward, torch.linalg.cholesky(gram))


class _Value(nn.Module):
    """g (c * e + W z), (documents, tokens, d_model); c is a scale per channel, W starts at zero.

    W z is multiplied by `step`, so that the first optimizer steps move it by a fraction of c and not by many times c.
    """

    def __init__(self, width: int, d_model: int, scale: float, gate_bias: float):
        super().__init__()
        self.step = 0.1 / width**0.5
        self.scale = nn.Parameter(torch.full((d_model,), scale))
        self.learned = nn.Linear(width, d_model, bias=False)
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.learned.weight)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, gate_bias)

    def forward(self, z: Tensor, words: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(z)) * (self.scale * words + self.step * self.learned(z))


class _Block(nn.Module):
    """Pre-norm bidirectional transformer block; the hidden states it reads already know their positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm_attention(z)), "b t (three h w) -> three b h t w", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        z = z + self.out(rearrange(mixed, "b h t w -> b t (h w)"))
        return z + self.mlp(self.norm_mlp(z))
