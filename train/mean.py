"""A generator between two: the weighted mean of their weights (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    python train/mean.py runs/default/generator runs/beside/generator -o runs/half --share 0.5
    python train/mean.py runs/recalled runs/default/generator -o runs/mixed --share 0.5 --only adapter

What training has added to a generator and what it has taken from it seldom go at the same pace: between both ends
most of either is kept (docs/research.md, 20, 22, 24 and 25).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from hyperlora.cli import guarded
from hyperlora.errors import InputError
from hyperlora.generator import Generator


def mean(first: Generator, second: Generator, share: float, only: Sequence[str] = ()) -> Generator:
    """The first generator with `share` (0 to 1) of the second in every weight that learns; calibration is the first's.

    Args:
        only: parts of the names of weights, as `trained` in a recipe: all others are the first's, which may have some
            that the second has not.

    Raises:
        InputError: they are of different sites or settings, or of different calibrations; no weight is named so.
    """
    weights, others = first.state_dict(), second.state_dict()
    measured = {name for name in weights if not name.startswith("hypernet.")}
    learned = {name for name in weights.keys() - measured if not only or any(part in name for part in only)}
    if not learned:
        raise InputError(f"no weight of the generator has {' or '.join(only)} in its name; give parts such as adapter")
    alike = first.sites == second.sites and all(
        name in others and others[name].shape == weights[name].shape for name in learned | measured
    )
    if not only:
        alike &= first.config == second.config and weights.keys() == others.keys()
    if not alike or not all(torch.equal(weights[name], others[name]) for name in measured):
        raise InputError("the generators differ in more than what was trained; start the second from the first")
    first.load_state_dict({name: torch.lerp(weights[name], others[name], share) for name in learned}, strict=False)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the second, 0 to 1")
    parser.add_argument("--only", default="", help="of weights with one of these parts in their names, with commas")
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        raise InputError(f"--share {options.share}: give a number from 0 to 1")
    first = Generator.from_pretrained(options.first)
    second = Generator.from_pretrained(options.second, first.base)
    mean(first, second, options.share, [part for part in options.only.split(",") if part])
    first.save_pretrained(options.output)
    print(options.output)


if __name__ == "__main__":
    guarded(main)
