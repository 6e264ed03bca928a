"""Generic text that statistics of a base are measured on."""

import random

from hyperlora.data.sources import load_texts
from hyperlora.errors import InputError
from hyperlora.recipe import Recipe


def calibration_texts(recipe: Recipe) -> list[str]:
    """Text pieces for the sites' statistics, spread over the sources' documents.

    Raises:
        InputError: the recipe's sources hold no text.
    """
    rng = random.Random(f"{recipe.seed}/calibration")
    items = [item for source in recipe.calibration.sources for item in load_texts(source)]
    if not items:
        raise InputError(f"no text to calibrate on in {', '.join(recipe.calibration.sources) or 'an empty list'}")
    picked = rng.choices(items, k=recipe.calibration.texts)
    pieces = []
    for item in picked:
        start = rng.randrange(max(1, len(item.text) - 6 * recipe.calibration.tokens))
        pieces.append(item.text[start : start + 6 * recipe.calibration.tokens])
    return pieces
