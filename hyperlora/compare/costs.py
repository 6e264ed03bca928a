"""What a memory costs: FLOPs counted by torch, and the clock, one document and one question at a time."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hyperlora.data.items import Item
from hyperlora.memory import Memory
from hyperlora.methods import Document, Method
from hyperlora.runtime import Runtime

_QUESTION = "What is this about?"


def measure_costs(
    method: Method, budgets: Sequence[int] | None, items: Sequence[Item], tokens: int, runtime: Runtime
) -> dict[str, Any]:
    """Medians over documents. The FLOPs of each are counted before it is timed, which warms the machine up.

    Returns:
        compile_flops, query_flops (the first token of a reply), and `timing`: compile_seconds, first_token_seconds,
        token_milliseconds (of the later tokens), peak_mib (memory above the loaded model while compiling).
    """
    rows: list[dict[str, float]] = []
    for number, item in enumerate(items):
        document = [Document(item.id, item.text)]
        budget = None if budgets is None else budgets[number : number + 1]
        question = item.questions[0].text if item.questions else _QUESTION
        prompts = [runtime.question(0, question)]
        memories: list[Memory] = []
        row = {
            "compile_flops": flops(lambda d=document, b=budget, m=memories: m.extend(method.compile(d, b))),  # type: ignore[misc]
            "query_flops": flops(lambda m=memories, p=prompts: runtime.generate_ids(m, p, 1)),  # type: ignore[misc]
        }
        with _peak(runtime) as peak:
            start = _now(runtime)
            memories = method.compile(document, budget)
            row["compile_seconds"] = _now(runtime) - start
        row["peak_mib"] = peak() / 2**20
        for name, count in (("first_token_seconds", 1), ("all_seconds", tokens)):
            start = _now(runtime)
            runtime.generate_ids(memories, prompts, count, stop=False)
            row[name] = _now(runtime) - start
        row["token_milliseconds"] = 1000 * (row.pop("all_seconds") - row["first_token_seconds"]) / (tokens - 1)
        rows.append(row)
    if not rows:
        return {"compile_flops": None, "query_flops": None, "timing": {}}
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    counted = {name: medians.pop(name) for name in ("compile_flops", "query_flops")}
    return {**counted, "timing": medians}


def flops(action: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and attention in `action`, backward passes included."""
    aten = torch.ops.aten
    unknown = {  # torch counts the kernels of CUDA, not those of the CPU
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        action()
    return float(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """From shapes (batch, heads, tokens, head_dim): two matrix products."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """The scores are computed again, and both products have two gradients: five products in all."""
    return 5 * _attention(query, key, value) // 2


def break_even(compile_flops: float, query_flops: float, base_once: float, base_query: float) -> float | None:
    """Questions on one document from which on the method has cost less than the base, in FLOPs; None for never.

    Q* = (C_compile - C_base_once) / (c_base - c_method), at least 0.
    """
    if base_query <= query_flops:
        return 0.0 if compile_flops < base_once and base_query == query_flops else None
    return max(0.0, (compile_flops - base_once) / (base_query - query_flops))


def _now(runtime: Runtime) -> float:
    if runtime.base.device.type == "cuda":
        torch.cuda.synchronize(runtime.base.device)
    return time.perf_counter()


@contextmanager
def _peak(runtime: Runtime) -> Iterator[Callable[[], float]]:
    """Inside the block memory is watched; the function gives the bytes at the peak above the start (0 if unknown)."""
    device = runtime.base.device
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
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before must not make room for what is measured
    try:
        reset.write_text("5")  # forget the peak so far, that before the trimming too
    except OSError:
        yield lambda: 0.0
        return
    before = kib("VmRSS")
    yield lambda: 1024.0 * max(0, kib("VmHWM") - before)
