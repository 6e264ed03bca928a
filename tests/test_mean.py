"""The mean of two generators, train/mean.py."""

import runpy
from pathlib import Path

import pytest
import torch

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError

from .conftest import OPTIONS, TEXT, make_generator

mean = runpy.run_path(str(Path(__file__).parents[1] / "train" / "mean.py"))["mean"]


def test_a_mean_lies_between_its_ends(base: BaseModel) -> None:
    first, second = make_generator(base), make_generator(base)
    for weight in second.hypernet.parameters():
        weight.data += 0.1
    before = {name: weight.clone() for name, weight in first.state_dict().items()}
    for name, weight in mean(first, second, 0.25).state_dict().items():
        moved = 0.025 if name in {f"hypernet.{own}" for own, _ in first.hypernet.named_parameters()} else 0.0
        torch.testing.assert_close(weight, before[name] + moved)


def test_generators_that_differ_otherwise_have_no_mean(base: BaseModel) -> None:
    other = make_generator(base)
    other.calibrate([TEXT[:99]])
    for second in (other, make_generator(base, rank=4)):
        with pytest.raises(InputError, match="start the second from the first"):
            mean(make_generator(base), second, 0.5)


def test_some_weights_alone_may_be_mixed(base: BaseModel) -> None:
    """Also of generators one of which has options that add weights."""
    first = make_generator(base, options=OPTIONS["associative"] | {"salience": True})
    second = make_generator(base)
    before = {name: weight.clone() for name, weight in first.state_dict().items()}
    second.load_state_dict({k: v for k, v in before.items() if not k.startswith("hypernet.")}, strict=False)
    for weight in second.hypernet.parameters():
        weight.data += 0.1
    others = second.state_dict()
    for name, weight in mean(first, second, 0.25, ["adapter", "aim"]).state_dict().items():
        mixed = name.startswith("hypernet.") and ("adapter" in name or "aim" in name)
        wanted = 0.75 * before[name] + 0.25 * others[name] if mixed else before[name]
        torch.testing.assert_close(weight, wanted)
    with pytest.raises(InputError, match="no weight of the generator has adaptor in its name"):
        mean(first, second, 0.25, ["adaptor"])
    with pytest.raises(InputError, match="start the second from the first"):
        mean(first, second, 0.25, ["salience"])
