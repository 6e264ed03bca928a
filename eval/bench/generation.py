"""Speed and memory of patch generation, as ratios within one run.

    python eval/bench/generation.py

Prints (1) the time to generate the patch of a 500-token document over one plain cached prefill of it, the median over
interleaved pairs, loading excluded; (2) the log-log slope of the time and the growth of peak memory above the loaded
model from 1k to `--longest` tokens, each length in a process of its own.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

import torch

from hyperlora.generator import Generator
from hyperlora.peak_memory import peak_memory


def document(generator: Generator, tokens: int) -> list[int]:
    text = " ".join(f"Day {day}: the keeper saw the ship pass the rock in fog." for day in range(tokens // 8))
    return generator.encoder.tokenize(text)[:tokens]


@torch.no_grad()
def ratio(generator: Generator, tokens: int, pairs: int) -> dict[str, float]:
    ids = document(generator, tokens)
    prompt = torch.tensor([ids], device=generator.base.device)
    parts: dict[str, float] = {}
    times: dict[str, list[float]] = {"prefill": [], "generate": []}
    for pair in range(pairs + 1):  # the first pair warms up
        start = time.perf_counter()
        generator.base.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        generator.factors([ids], parts if pair else None)
        if pair:
            times["prefill"].append(middle - start)
            times["generate"].append(time.perf_counter() - middle)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    pieces = {f"{name}_mean": value / pairs for name, value in parts.items()}
    # Of each pair, so that a machine that slows down for a while slows both.
    ratios = [made / read for made, read in zip(times["generate"], times["prefill"], strict=True)]
    return {"tokens": tokens, **seconds, **pieces, "ratio": statistics.median(ratios)}


@torch.no_grad()
def long_document(generator: Generator, tokens: int) -> dict[str, float]:
    ids = document(generator, tokens)
    generator.factors([ids[:64]])
    with peak_memory(generator.base.device) as peak:
        start = time.perf_counter()
        generator.factors([ids])
        seconds = time.perf_counter() - start
    return {"tokens": tokens, "seconds": seconds, "peak_mib": peak() / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--longest", type=int, default=16384, help="tokens, 1024 doubled some times")
    parser.add_argument("--length", type=int, help="internal: measure one length and print JSON")
    options = parser.parse_args()
    if options.length:
        print(json.dumps(long_document(Generator.from_pretrained(options.generator), options.length)))
        return
    print(json.dumps(ratio(Generator.from_pretrained(options.generator), 500, options.pairs)))
    command = [sys.executable, __file__] + (["--generator", options.generator] if options.generator else [])
    rows = []
    for length in (1024 << step for step in range((options.longest // 1024).bit_length())):
        out = subprocess.run([*command, "--length", str(length)], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(out.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]))
    x = [math.log(row["tokens"]) for row in rows]
    y = [math.log(row["seconds"]) for row in rows]
    slope = statistics.covariance(x, y) / statistics.variance(x)
    print(json.dumps({"slope": slope, "memory_longest_over_1k": rows[-1]["peak_mib"] / rows[0]["peak_mib"]}))


if __name__ == "__main__":
    main()
