"""A generator between two: the weighted mean of their weights (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    python train/mean.py hyperlora/pretrained runs/beside/generator -o runs/half --share 0.5

What training has added to a generator and what it has taken from it seldom go at the same pace: between both ends
most of either is kept (docs/research.md, 20 and 22).
"""

import argparse
from pathlib import Path

import torch

from hyperlora.cli import guarded
from hyperlora.errors import InputError
from hyperlora.generator import Generator


def mean(first: Generator, second: Generator, share: float) -> Generator:
    """The first generator with `share` (0 to 1) of the second in every weight that learns; calibration is the first's.

    Raises:
        InputError: they are of different sites or settings, or of different calibrations.
    """
    weights, others = first.state_dict(), second.state_dict()
    alike = first.sites == second.sites and first.config == second.config and weights.keys() == others.keys()
    measured = [name for name in weights if not name.startswith("hypernet.")]
    if not alike or not all(torch.equal(weights[name], others[name]) for name in measured):
        raise InputError("the generators differ in more than what was trained; start the second from the first")
    learned = weights.keys() - set(measured)
    first.load_state_dict({name: torch.lerp(weights[name], others[name], share) for name in learned}, strict=False)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the second, 0 to 1")
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        raise InputError(f"--share {options.share}: give a number from 0 to 1")
    first = Generator.from_pretrained(options.first)
    mean(first, Generator.from_pretrained(options.second, first.base), options.share).save_pretrained(options.output)
    print(options.output)


if __name__ == "__main__":
    guarded(main)
