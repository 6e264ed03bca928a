"""Which parameters of a hypernetwork learn, and how fast."""

import math
from typing import Any

from torch import nn

from hyperlora.errors import InputError, nearest
from hyperlora.hypernet import Hypernet
from hyperlora.recipe import Recipe


def rated_groups(hypernet: Hypernet, recipe: Recipe) -> tuple[list[dict[str, Any]], list[float]]:
    """An optimizer's groups of the parameters that the recipe trains, and the learning rate of each; all others are
    frozen.

    Raises:
        InputError: the recipe names a parameter that there is not.
    """
    named = dict(hypernet.named_parameters())
    for part in recipe.trained:
        if not any(part in name for name in named):
            known = sorted({name.partition(".")[0] for name in named})
            raise InputError(f"trained: no parameter of the generator is named {part!r}; {nearest(part, known)}")
    strong: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named.items():
        parameter.requires_grad_(not recipe.trained or any(part in name for part in recipe.trained))
        if parameter.requires_grad:
            own = recipe.strength_rate is not None and name.endswith(hypernet.strengths)
            (strong if own else rest).append(parameter)
    rated = [(rest, recipe.learning_rate), (strong, recipe.strength_rate or 0.0)]
    rated = [(parameters, rate) for parameters, rate in rated if parameters]
    return [{"params": parameters} for parameters, _ in rated], [rate for _, rate in rated]


def cosine(rate: float, step: int, warmup: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up to `rate`, then a cosine to a tenth of it at the last step."""
    if step < warmup:
        return rate * (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))
