"""What a comparison finds, made up, and the same with hostile text in it."""

import random
from typing import Any

HOSTILE = "<script>alert(1)</script> | {{ 7*7 }} $\\frac{1}$ `x` ![i](http://a.b/c.png)\n# owned\n| a | b |\x00\ud800"
METRICS = {"facts": ["exact_match", "f1", "nll"], "books": ["nll"]}
# Resident bytes, compile seconds, quality.
METHODS: dict[str, tuple[float, float | None, float]] = {
    "none": (0.0, 0.0, 0.02),
    "full": (9_437_184.0, 0.0, 0.9),
    "truncation": (1_179_648.0, 0.002, 0.31),
    "random eviction": (1_179_648.0, 0.41, 0.24),
    "summary": (1_163_264.0, 7.9, 0.28),
    "generator": (1_179_648.0, 0.83, 0.69),
    "context distillation": (1_179_648.0, 148.0, 0.74),
    "self-study": (1_179_648.0, None, 0.52),
}


def row(rng: random.Random, mean: float) -> dict[str, float]:
    width = 0.01 + 0.03 * rng.random()
    mean += 0.004 * rng.random()
    return {"mean": mean, "low": mean - width, "high": mean + 1.2 * width}


def make_results() -> dict[str, Any]:
    """What a comparison on two tasks finds; needles have a depth and a length."""
    rng = random.Random(0)
    scores, differences, gains, by_tag = [], [], [], []
    for task, metrics in METRICS.items():
        for method, (_, _, quality) in METHODS.items():
            for metric in metrics:
                key: dict[str, Any] = {"task": task, "method": method, "metric": metric}
                own, swapped = (4 - 3 * quality, 4.1) if metric == "nll" else (quality, 0.02)
                scores.append({**key, "condition": "own", "documents": 40, **row(rng, own)})
                scores.append({**key, "condition": "swapped", "documents": 39, **row(rng, swapped)})
                for against in ("full", "swapped"):
                    differences.append({**key, "against": against, **row(rng, own - swapped)})
                gain = {"gain": quality, "low": quality - 0.05, "high": quality + 0.06}
                gains.append({**key, "kind": "raw", **gain, "numerator": 0.4321, "denominator": 0.8765, "weak": False})
                nothing = {"gain": None, "low": None, "high": None}
                gains.append(
                    {**key, "kind": "adapted", **nothing, "numerator": 0.003, "denominator": 0.012, "weak": True}
                )
    for method, (_, _, quality) in list(METHODS.items())[1::2]:
        key = {"task": "facts", "method": method, "metric": "exact_match", "documents": 8}
        for i, depth in enumerate((0.0, 0.25, 0.5, 1.0)):
            for j, length in enumerate((256, 512, 1024)):
                value = quality * (1 - 0.12 * j) * (0.7 + 0.1 * abs(i - 2))
                by_tag.append({**key, "tag": "depth×length", "value": f"{depth}×{length}", **row(rng, value)})
        for style, value in (("a list of sentences", quality), ("prose", 0.8 * quality)):
            by_tag.append({**key, "tag": "style", "value": style, **row(rng, value)})
        for years in (1, 2, 10):
            by_tag.append({**key, "tag": "years", "value": years, **row(rng, quality / years)})
    steps = [[n, 1 - 0.9**n, 0.97 - 0.9**n, 1.02 - 0.9**n] for n in range(0, 30, 3)]
    growing = ["truncation", "summary", "generator", "context distillation"]
    times = [[x, 0.1 + 0.2 * n, 0.05 + 0.2 * n, 0.15 + 0.2 * n] for n, x in enumerate(growing)]
    return {
        "name": "matched bytes",
        "version": "0.1.0",
        "command": "hyperlora compare eval/matched.yaml -o out",
        "base": {"name": "SmolLM2-135M", "fingerprint": {"weights": "ab12cd", "layers": 30}, "dtype": "torch.float32"},
        "machine": {"python": "3.11.7", "device": "cpu"},
        "seeds": [0, 1],
        "costs": {"task": "facts", "documents": 3, "tokens": 16},
        "unrelated": {"source": "wikitext2_test", "tokens": 256, "windows": 41, "behind": "<s>user\n"},
        "tasks": {
            task: {"kind": "answers", "metrics": metrics, "documents": 40, "questions": 77, "settings": {"facts": 2}}
            for task, metrics in METRICS.items()
        },
        "methods": {
            method: {
                "name": method.replace(" ", "_"),
                "settings": {"rank": 16, "match": "generator"},
                "seeds": [4, 5] if method == "random eviction" else [],
                "summary": f"What {method} does.",
                "stored_bytes": resident / 2,
                "resident_bytes": resident,
                "shared_bytes": 21_879_664,
                "effective_ratio": 9_437_184 / resident if resident else None,
                "compile_flops": 1.2345e12,
                "query_flops": 6.66e9,
                "timing": {
                    "compile_seconds": compiling,
                    "first_token_seconds": 0.0567,
                    "token_milliseconds": 34.5,
                    "peak_mib": 1234.4,
                    "answer_peak_mib": 123.4,
                    "while_counted": (compiling or 0) >= 60,
                },
                "break_even": {
                    "re-prefilling": [12.34, None],
                    "cached KV": [0.0, 4.56] if method == "full" else None,
                },
            }
            for method, (resident, compiling, _) in METHODS.items()
        },
        "scores": scores,
        "differences": differences,
        "gains": gains,
        "flags": [
            {"task": "books", "method": "summary", "metric": metric, "reason": "swapped is not clearly worse"}
            for metric in ("nll", "f1")
        ],
        "forgetting": [
            {"method": "generator", "measure": "loss", "unit": "nats per token", "documents": 41, **row(rng, 0.064)}
        ],
        "by_tag": by_tag,
        "curves": [
            {
                "label": "context distillation",
                "task": "facts",
                "metric": "exact_match",
                "x": "seconds",
                "points": times,
            },
            {"label": "generator, training", "task": "facts", "metric": "exact_match", "x": "steps", "points": steps},
        ],
        "examples": [
            {
                "task": "facts",
                "document": "Marta Oskwell lives in Brno. " * 40,
                "question": f"Where does person {number} live?",
                "accepted": ["Brno", "in Brno"],
                "replies": {"generator": "Brno", "none": "I do not know."},
            }
            for number in range(4)
        ],
    }


def without_lists(results: dict[str, Any]) -> dict[str, Any]:
    return {key: [] if isinstance(value, list) else value for key, value in results.items()}


KEPT = {*METRICS["facts"], *METHODS, "books", "own", "swapped", "seconds", "steps", "raw", "adapted"} - {"generator"}


def poisoned(value: Any) -> Any:
    """The results with hostile text wherever the report does not need to know a word."""
    if isinstance(value, dict):
        return {HOSTILE + k if k in ("facts", "generator") else k: poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(part) for part in value]
    return HOSTILE + value if isinstance(value, str) and value not in KEPT and "×" not in value else value
