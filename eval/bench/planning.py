"""`hyperlora plan` against real steps: bytes and operations planned, bytes and seconds measured.

    python eval/bench/planning.py train/facts.yaml --documents 2,8
    python eval/bench/planning.py train/facts.yaml --base gemma3-270m --set checkpointing=true
    torchrun --nproc-per-node 2 eval/bench/planning.py train/facts.yaml --documents 4 --deepspeed ds_configs/zero2.json

Each number of documents runs two steps in a process of its own. Documents are what the recipe draws, all of the length
of the longest, so that measured and planned sizes are of the same work. Under a launcher give one number; the
first rank prints. Measured is the peak of resident memory above the loaded base and generator.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from hyperlora import planning, ranks
from hyperlora.packing import alike
from hyperlora.peak_memory import peak_memory
from hyperlora.recipe import Recipe, read_recipe
from hyperlora.training import start


def measure(recipe: Recipe, base: str | None, documents: int, deepspeed: Path | None) -> dict[str, Any]:
    settings, stage = None, None
    recipe = recipe.model_copy(update={"documents": documents, "base": base or recipe.base})
    recipe.evaluation.facts, recipe.evaluation.qa = [], []
    if deepspeed is None:
        ranks.join()
    else:
        from hyperlora import zero

        zero.join()
        settings = zero.read_settings(deepspeed, recipe)
        stage = settings["zero_optimization"]["stage"]
    folder = Path(tempfile.mkdtemp()) / "run"
    folder.mkdir()
    torch.manual_seed(0)
    with peak_memory(torch.device("cpu")) as loading:
        run = start(recipe, folder, "bench", settings)
    drawn = [run.drawing.mix.draw(0) for _ in range(200)]
    item, rng = max(drawn, key=lambda pair: len(run.generator.encoder.tokenize(pair[0].text)))
    run.drawing.mix.pick = lambda _: (lambda: item, rng)  # type: ignore[method-assign, assignment, return-value]
    rows = run.student.rows(0, item, rng)
    load = planning.Load(
        document=len(run.generator.encoder.tokenize(item.text)),
        questions=len(rows),
        row=max(len(row.ids) for row in rows),
        labels=max(row.labels for row in rows),
        weight=1.0,
        alike=alike([row.ids[: row.start] for row in rows]),
    )
    with peak_memory(run.base.device) as peak:
        run.train_step()
    measured = peak()
    begin = time.perf_counter()
    run.train_step()
    seconds = time.perf_counter() - begin
    step = planning.plan(recipe, None, documents, [load], run.base.model.dtype)
    memory = planning.memory(step, stage, ranks.count())
    planned = memory.gradients + memory.optimizer + memory.buffers + step.working
    flops = step.flops * recipe.micro_batches / ranks.count()
    return {
        "documents": documents,
        "tokens": load.document,
        "stage": stage,
        "processes": ranks.count(),
        "planned_mib": planned / 2**20,
        "measured_mib": measured / 2**20,
        "planned_over_measured": planned / measured,
        "gflop": flops / 1e9,
        "seconds": seconds,
        "gflops_per_second": flops / 1e9 / seconds,
        "loading_mib": loading() / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--documents", default="2,4,8")
    parser.add_argument("--deepspeed", type=Path)
    parser.add_argument("--set", action="append", default=[], help="key=value of the recipe, in YAML")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    changes = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in options.set)}
    counts = [int(part) for part in options.documents.split(",")]
    if len(counts) > 1:
        arguments = [part for pair in options.set for part in ("--set", pair)]
        arguments += ["--base", options.base] if options.base else []
        for count in counts:
            subprocess.run(
                [sys.executable, __file__, str(options.recipe), "--documents", str(count), *arguments], check=True
            )
        return
    record = measure(read_recipe(options.recipe, **changes), options.base, counts[0], options.deepspeed)
    if ranks.own() == 0:
        print(json.dumps(record))
    ranks.leave()


if __name__ == "__main__":
    main()
