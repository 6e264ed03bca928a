"""What moves the trained module: gradients, their sum over processes, the optimizer, its state on disk."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from hyperlora import ranks
from hyperlora.checkpoint import load_moments, save_moments


class Engine(ABC):
    """One training step is any number of `backward`, the last of them marked, and one `step`.

    Losses of all processes add up: each is a part of one sum over the whole batch.

    Attributes:
        call: the module's forward pass.
        layout: what the optimizer's state on disk depends on.
    """

    call: Callable[..., Any]
    layout: dict[str, Any]

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a scalar to the step's."""

    @abstractmethod
    def step(self, rates: Sequence[float]) -> float:
        """Update with a learning rate for each group of parameters. Returns the gradient's norm before clipping."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[Any]:
        """Inside the block every process holds all of the weights."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the optimizer's state into a checkpoint's folder; called in every process."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read it back. Raises InputError when it is not of this engine's layout."""


class PlainEngine(Engine):
    """Torch's optimizer; every process holds all of it. A step whose gradient is not finite changes nothing."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, clip: float):
        self.call, self.optimizer, self.clip = module.__call__, optimizer, clip
        self.parameters = list(module.parameters())
        self.layout = {"engine": "plain"}

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, rates: Sequence[float]) -> float:
        add_up([p.grad for p in self.parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        set_rates(self.optimizer, rates)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def whole(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def save(self, folder: Path) -> None:
        if ranks.own() == 0:
            save_moments(self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_moments(self.optimizer, folder)


def add_up(gradients: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if ranks.count() > 1:
        held = list(gradients)
        flat = torch.cat([tensor.flatten() for tensor in held])
        dist.all_reduce(flat)
        for tensor, part in zip(held, flat.split([tensor.numel() for tensor in held]), strict=True):
            tensor.copy_(part.view_as(tensor))


def set_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
