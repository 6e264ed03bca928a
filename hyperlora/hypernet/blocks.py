"""Attention blocks that the hypernetworks share. They add no position codes: the hidden states they read know their
positions."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm transformer block in which every row sees all others: self-attention, then an MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """z (batch, rows, width); mask (batch, rows), False at rows that nobody may see."""
        q, k, v = rearrange(self.qkv(self.norm_attention(z)), "b t (three h w) -> three b h t w", three=3, h=self.heads)
        z = z + self.out(_attend(q, k, v, mask))
        return z + self.mlp(self.norm_mlp(z))


class CrossAttention(nn.Module):
    """Rows z read tokens, which are normalised already."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    @torch.no_grad()
    def pass_on(self, sharpness: float) -> None:
        """Begin with values that are the tokens themselves, and with scores so many times as large as they would be."""
        self.q.weight.mul_(sharpness)
        width = self.out.in_features
        for weight in (self.kv.weight[width:], self.out.weight):
            nn.init.eye_(weight)
        for bias in (self.kv.bias, self.out.bias):
            nn.init.zeros_(bias)

    def forward(self, z: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """z (batch, rows, width), tokens (batch, tokens, width), mask (batch, tokens)."""
        q = rearrange(self.q(self.norm(z)), "b t (h w) -> b h t w", h=self.heads)
        k, v = rearrange(self.kv(tokens), "b t (two h w) -> two b h t w", two=2, h=self.heads)
        return z + self.out(_attend(q, k, v, mask))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, rows, heads * width) from q, k, v (batch, heads, rows, width)."""
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return rearrange(mixed, "b h t w -> b t (h w)")
