"""What a memory costs: FLOPs counted by torch, and the clock, one document and one question at a time."""

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from hyperlora.data.items import Item
from hyperlora.flop_counter import flop_counter
from hyperlora.memory import Memory
from hyperlora.methods import Document, Method
from hyperlora.peak_memory import peak_memory
from hyperlora.runtime import Runtime

COSTS_FORMAT = 3  # raised when more is measured
_QUESTION = "What is this about?"
_LONG = 60  # seconds


def measure_costs(
    method: Method, budgets: Sequence[int] | None, items: Sequence[Item], tokens: int, runtime: Runtime
) -> dict[str, Any]:
    """Medians over documents, of a method that takes nothing from others. The FLOPs of each are counted before it is
    timed, which warms the machine up; work of more than a minute is timed while they are counted.

    Returns:
        compile_flops, query_flops (the first token of a reply), and `timing`: compile_seconds, first_token_seconds,
        token_milliseconds (of the later tokens), and memory above the loaded model, peak_mib while compiling and
        answer_peak_mib while answering.
    """
    rows: list[dict[str, float]] = []
    method = copy.copy(method)
    method.common = None
    # What is done once would count or not, as earlier documents were made in this process or another.
    method.prepare()
    _ = runtime.base.kv_bytes_per_token
    for number, item in enumerate(items):
        document = [Document(item.id, item.text)]
        budget = None if budgets is None else budgets[number : number + 1]
        question = item.questions[0].text if item.questions else _QUESTION
        prompts = [runtime.question(0, question)]
        with flop_counter() as counter:
            memories, measured = _compile(method, document, budget, runtime)
        if measured["compile_seconds"] < _LONG:
            memories, measured = _compile(method, document, budget, runtime)
        row = {
            "compile_flops": float(counter.get_total_flops()),
            "query_flops": flops(lambda m=memories, p=prompts: runtime.generate_ids(m, p, 1)),  # type: ignore[misc]
            **measured,
        }
        for name, count in (("first_token_seconds", 1), ("all_seconds", tokens)):
            start = runtime.base.now()
            runtime.generate_ids(memories, prompts, count, stop=False)
            row[name] = runtime.base.now() - start
        with peak_memory(runtime.base.device) as peak:  # apart: it takes the allocator's freed memory away first
            runtime.generate_ids(memories, prompts, tokens, stop=False)
            row["answer_peak_mib"] = peak() / 2**20
        row["token_milliseconds"] = 1000 * (row.pop("all_seconds") - row["first_token_seconds"]) / (tokens - 1)
        rows.append(row)
    if not rows:
        return {"compile_flops": None, "query_flops": None, "timing": {}}
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    counted = {name: medians.pop(name) for name in ("compile_flops", "query_flops")}
    return {**counted, "timing": medians}


def _compile(
    method: Method, documents: Sequence[Document], budgets: Sequence[int] | None, runtime: Runtime
) -> tuple[list[Memory], dict[str, float]]:
    with peak_memory(runtime.base.device) as peak:
        start = runtime.base.now()
        memories = method.compile(documents, budgets)
        seconds = runtime.base.now() - start
    return memories, {"compile_seconds": seconds, "peak_mib": peak() / 2**20}


def flops(action: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and attention in `action`, backward passes included."""
    with flop_counter() as counter:
        action()
    return float(counter.get_total_flops())


def timed_while_counted(timing: dict[str, float]) -> bool:
    """Whether compilations take so long that they were timed while their FLOPs were counted, which slows them."""
    return timing.get("compile_seconds", 0.0) >= _LONG


def break_even(
    compile_flops: float, query_flops: float, base_once: float, base_query: float
) -> tuple[float, float | None] | None:
    """The numbers of questions on one document, from where and up to where, for which the method has cost less than the
    base, in FLOPs: up to None without end, and None for never.

    Q* = (C_compile - C_base_once) / (c_base - c_method), at least 0: from there on where the method's queries are the
    cheaper ones, up to the last whole question before it where only its compilation is.
    """
    if base_query == query_flops:
        return (0.0, None) if compile_flops < base_once else None
    questions = max(0.0, (compile_flops - base_once) / (base_query - query_flops))
    if query_flops < base_query:
        return questions, None
    last = math.ceil(questions) - 1
    return (0.0, float(last)) if last > 0 else None
