"""Have another process prepare what a GPU will read next, so that it does not wait for the tokenizer."""

import multiprocessing
import os
import pickle
import queue
import signal
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from hyperlora.errors import OutOfMemory

T = TypeVar("T")

_AHEAD = 8  # how many things are prepared before they are asked for
_PATIENCE = 5.0  # seconds after which to look whether the process is still there


def ahead(make: Callable[[], Iterator[T]]) -> Generator[T, None, None]:
    """What the iterator of `make` gives, made by a process of its own, which ends with this generator.

    The process is a copy of this one: what happens to `make`'s objects there is not seen here, and it must leave the
    GPU alone. Signals that end a run are for this process; the other one takes no notice. What it makes comes as bytes:
    tensors in shared memory would each hold a file open. Where processes cannot be copied, there is none.

    Raises:
        OutOfMemory: the process was killed, which want of memory does.
        RuntimeError: it ended in another way, or `make` raised what cannot be sent.
        Exception: whatever else `make` raises.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        yield from make()
        return
    context = multiprocessing.get_context("fork")
    made: Any = context.Queue(_AHEAD)
    worker = context.Process(target=_work, args=(make, made, os.getpid()), daemon=True)
    worker.start()
    try:
        while True:
            try:
                item = pickle.loads(made.get(timeout=_PATIENCE))
            except queue.Empty:
                if worker.is_alive():
                    continue
                who, code = "the process that draws documents", worker.exitcode or 0
                if code >= 0:
                    raise RuntimeError(f"{who} ended (exit code {code})") from None
                raise OutOfMemory(
                    f"{who} was killed (exit code {code}), by want of memory perhaps; free some, or name fewer "
                    "sources, and go on from the last checkpoint"
                ) from None
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        worker.kill()


class _End:
    """After the last item, or in the place of one that could not be made."""

    def __init__(self, error: Exception | None = None):
        self.error = error


def _work(make: Callable[[], Iterator[Any]], made: Any, reader: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end = _End()
    try:
        for item in make():
            _put(made, item, reader)
    except Exception as error:  # raised where the item is asked for
        end = _End(_sendable(error))
    _put(made, end, reader)


def _sendable(error: Exception) -> Exception:
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:  # what an error holds may be anything
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _put(made: Any, item: Any, reader: int) -> None:
    """Hand an item over; end this process when the one that reads was killed and cannot end it."""
    content = pickle.dumps(item)
    while True:
        try:
            made.put(content, timeout=_PATIENCE)
        except queue.Full:
            if os.getppid() != reader:
                os._exit(1)
        else:
            return
