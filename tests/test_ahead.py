"""The process that draws ahead: equal items, and no run that hangs or loses its end because of it."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from hyperlora.data.ahead import ahead
from hyperlora.errors import InputError, OutOfMemory


def numbers() -> Iterator[tuple[int, torch.Tensor]]:
    for number in range(20):
        yield number, torch.full((2,), float(number))


def endless() -> Iterator[int]:
    while True:
        yield os.getpid()


def test_items_come_in_order_and_end() -> None:
    found = list(ahead(numbers))
    assert [number for number, _ in found] == list(range(20))
    assert all(torch.equal(own, torch.full((2,), float(number))) for number, own in found)


def test_errors_are_raised_where_the_item_is_asked_for() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise InputError("no such file")

    items = ahead(failing)
    assert next(items) == 1
    with pytest.raises(InputError, match="no such file"):
        next(items)


class Unsendable(Exception):
    def __init__(self, message: str, where: object):
        super().__init__(message)


def test_an_error_that_cannot_be_sent_says_what_it_was() -> None:
    def failing() -> Iterator[int]:
        raise Unsendable("the seventh line", lambda: None)
        yield 1

    with pytest.raises(RuntimeError, match="Unsendable: the seventh line"):
        list(ahead(failing))


def test_a_process_that_ends_by_itself_was_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperlora.data.ahead._PATIENCE", 0.1)

    def leaving() -> Iterator[int]:
        yield 1
        os._exit(3)

    items = ahead(leaving)
    with pytest.raises(RuntimeError, match=r"ended \(exit code 3\)"):
        list(items)


def test_signals_that_end_a_run_leave_the_process_and_the_end_of_the_run_takes_it_along() -> None:
    items = ahead(endless)
    other = next(items)
    assert other != os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(other, number)
    assert [next(items) for _ in range(30)] == [other] * 30
    items.close()
    assert os.waitpid(other, 0)[1] == signal.SIGKILL


def test_the_process_ends_when_its_reader_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr("hyperlora.data.ahead._PATIENCE", 0.1)
    context = multiprocessing.get_context("fork")
    told, tell = context.Pipe(duplex=False)

    def reading() -> None:
        items = ahead(endless)
        tell.send(next(items))
        time.sleep(60)

    reader = context.Process(target=reading)
    reader.start()
    worker = psutil.Process(told.recv())
    assert worker.ppid() == reader.pid
    reader.kill()
    reader.join()
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_killed_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperlora.data.ahead._PATIENCE", 0.1)
    items = ahead(endless)
    os.kill(next(items), signal.SIGKILL)
    with pytest.raises(OutOfMemory, match="was killed"):
        for _ in items:
            pass
