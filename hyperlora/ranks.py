"""Processes that do one job together, as torchrun and deepspeed start them: which one this is, what they agree on."""

import atexit
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

APART = timedelta(days=30)  # processes with a share of their own: one may be done days before another
TRAINING = timedelta(hours=2)  # processes that wait for each other in every step


def launched() -> int:
    """How many processes the launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(patience: timedelta = APART) -> None:
    """Form the group of all processes that a launcher started; each waits for another for at most `patience`."""
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=patience)


def leave() -> None:
    """Wait for the others and part."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def end(code: object) -> NoReturn:
    """End this process with the code of a `SystemExit`.

    A thread of gloo may still hold tensors when the interpreter goes down, and its grasp for the interpreter's lock
    then aborts a process that has done all of its work (https://github.com/pytorch/pytorch/issues/38228). So the exit
    handlers run, and nothing after them.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until all processes are here."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    return total([float(flag)])[0] > 0


def agree(number: int) -> bool:
    """Whether a number is the same in all processes."""
    return most(number) == -most(-number)


def most(number: int) -> int:
    """The largest of a number over all processes."""
    if count() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def total(values: list[float]) -> list[float]:
    """The sums of numbers over all processes."""
    if count() == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()
