"""Have another process prepare what a GPU will read next, so that it does not wait for the tokenizer."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, IterableDataset

T = TypeVar("T")

_AHEAD = 8  # how many things are prepared before they are asked for


class _Endless(IterableDataset[T], Generic[T]):
    def __init__(self, make: Callable[[], Iterator[T]]):
        self._make = make

    def __iter__(self) -> Iterator[T]:
        return self._make()


def ahead(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """What the iterator of `make` gives, made by a process of its own.

    The process is a copy of this one: what happens to `make`'s objects there is not seen here, and it must leave the
    GPU alone.
    """
    loader = DataLoader(
        _Endless(make), batch_size=None, num_workers=1, prefetch_factor=_AHEAD, multiprocessing_context="fork"
    )
    return iter(loader)
