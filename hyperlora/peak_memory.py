"""The most memory that code takes while it runs, measured: of a GPU, or of this process on Linux."""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of glibc, and of tcmalloc where it is preloaded (docs/training.md).
_RELEASE = {"malloc_trim": (0,), "MallocExtension_ReleaseFreeMemory": ()}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Inside the block memory is watched; the function gives the bytes at the peak above the start (0 if unknown)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device) - before)
        return
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        yield lambda: 0.0
        return

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    gc.collect()
    loaded = ctypes.CDLL(None)
    for release, arguments in _RELEASE.items():
        if hasattr(loaded, release):  # what was freed before must not make room for what is measured
            getattr(loaded, release)(*arguments)
    try:
        reset.write_text("5")  # forget the peak so far, that before the trimming too
    except OSError:
        yield lambda: 0.0
        return
    before, mapped = kib("VmRSS"), kib("RssFile")

    def peak() -> float:
        # A kernel may send pages of files away at any time, those of libraries too: the work took none of its memory
        # from there. Those that leave after the peak are counted as well, so it is never too low.
        left = max(0, mapped - kib("RssFile"))
        return 1024.0 * max(0, kib("VmHWM") - before + left)

    yield peak
