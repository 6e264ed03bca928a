"""The project's own errors: one line for the user, and an exit code for the command line."""

import difflib
from collections.abc import Iterable

# What has no kind of its own: the CPU's allocator, CUDA outside its allocator, its linear algebra.
_MEMORY = (
    *("can't allocate memory", "std::bad_alloc", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED"),
)
# What gloo says; errors of NCCL have kinds of their own (`torch.distributed.DistError`).
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo/transport")


class HyperloraError(Exception):
    """An expected failure. The message is one line that says what to do; the CLI prints it and exits with `code`."""

    code = 1


class InputError(HyperloraError):
    """The user's input (file, recipe, option) cannot be used as it is."""

    code = 3


class BaseMismatch(HyperloraError):
    """A patch or generator was made for another base model."""

    code = 4


class TrainingDiverged(HyperloraError):
    """The gradients stopped being finite."""


class OutOfMemory(HyperloraError):
    """More memory is needed than there is."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, of a GPU or the CPU."""
    kind = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return kind or any(words in str(error) for words in _MEMORY)


def lost_peer(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone, or waited for in vain."""
    return type(error).__name__.startswith("Dist") or any(words in str(error) for words in _LOST)


def nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error about an unknown `word`: the closest known names, or all of them."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(names))}"
