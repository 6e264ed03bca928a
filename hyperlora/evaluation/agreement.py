"""Agreement between raters beyond chance: Cohen's kappa (1960) for two, Fleiss' kappa (1971) for more."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any


def agreement(ratings: Sequence[Sequence[Hashable]]) -> dict[str, Any]:
    """Kappa of (raters, subjects) categories, at least two raters, with the statistic's name."""
    if len(ratings) == 2:
        return {"statistic": "Cohen's kappa", "kappa": cohen_kappa(*ratings)}
    return {"statistic": "Fleiss' kappa", "kappa": fleiss_kappa(ratings)}


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Chance is what the two raters' own shares give. None where all ratings are the same: chance explains all."""
    count, one, other = len(first), Counter(first), Counter(second)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    chance = sum(one[category] * other[category] for category in one) / count**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def fleiss_kappa(ratings: Sequence[Sequence[Hashable]]) -> float | None:
    """Chance is what the shares of all ratings together give. None where all ratings are the same."""
    raters, subjects = len(ratings), len(ratings[0])
    counts = [Counter(subject) for subject in zip(*ratings, strict=True)]
    pairs = sum(number * (number - 1) for subject in counts for number in subject.values())
    observed = pairs / (subjects * raters * (raters - 1))
    totals = Counter(category for rating in ratings for category in rating)
    chance = sum(number**2 for number in totals.values()) / (subjects * raters) ** 2
    return None if chance == 1 else (observed - chance) / (1 - chance)
