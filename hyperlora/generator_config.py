"""What a generator is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class GeneratorConfig(BaseModel):
    """Settings of a generator; all of them are written to its config.json.

    Attributes:
        hypernet: architecture, a key of `HYPERNETS`; `options` are its own settings.
        rank: of the patch, per site.
        max_rank, rank_tokens: a document of n times `rank_tokens` has n times `rank`, up to `max_rank`; None keeps
            `rank` for all lengths.
        layers: 0-based layers to patch; None spreads `layer_count` of them from the middle to 85 % of the depth: what
            is asked has been understood there, and reading a document costs less than a whole forward pass.
        modules: target modules as endings of their path in a layer; None is the output projection of attention,
            where names can be told apart (docs/research.md).
        chunk_tokens: longest piece of document read at once, if the base's window is twice as long.
        norm_limit: the patch of a document of several chunks moves outputs on generic text at most this many times as
            far as its strongest chunk alone; None does not limit it.
        moment_directions, ridge: see `SecondMoment`.
    """

    model_config = ConfigDict(extra="forbid")

    hypernet: str = "associative"
    options: dict[str, Any] = {}
    rank: int = Field(default=64, gt=0)
    max_rank: int | None = Field(default=256, gt=0)
    rank_tokens: int = Field(default=512, gt=0)
    layers: list[int] | None = Field(default=None, min_length=1)
    layer_count: int = Field(default=6, gt=0)
    modules: list[str] | None = None
    chunk_tokens: int = Field(default=2048, gt=1)
    norm_limit: float | None = Field(default=None, ge=1)
    moment_directions: int = Field(default=32, ge=0)
    ridge: float = Field(default=0.05, gt=0)

    def changed(self, changes: "GeneratorConfig") -> "GeneratorConfig":
        """These settings with those that were named in `changes`, of its options too."""
        named = {key: getattr(changes, key) for key in changes.model_fields_set}
        return self.model_copy(update=named | {"options": self.options | changes.options})

    def rank_of(self, tokens: int) -> int:
        """Ranks of the patch of a document of so many tokens, per site."""
        return max(self.rank, min(self.max_rank or 0, -(-tokens // self.rank_tokens) * self.rank))

    def resolve_layers(self, total: int) -> list[int]:
        if self.layers is not None:
            return self.layers
        first, count = max(0, total // 2 - 1), min(self.layer_count, total)
        last = max(first, round(0.85 * total) - 1)
        return sorted({round(first + (last - first) * i / max(1, count - 1)) for i in range(count)})
