"""`hyperlora compare`: methods against tasks."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from hyperlora.cli import loading, options


def compare(
    experiment: Annotated[Path, typer.Argument(help="Experiment (YAML): tasks and methods.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results; an unfinished one goes on.")],
    shard: Annotated[
        str | None, typer.Option(help="i/n: do every n-th unit only, i from 1; run without it to report.")
    ] = None,
    base: options.Base = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run methods on tasks with controls, costs and 95 % intervals; write results.json and a report.

    What is finished is kept: the same command goes on where it was stopped. Under torchrun or deepspeed every rank does
    a shard, and the first one reports.
    """
    from hyperlora import ranks
    from hyperlora.base_model import load_base
    from hyperlora.compare.experiment import read_experiment
    from hyperlora.compare.run import Comparison

    read, several = read_experiment(experiment, base), ranks.launched() > 1
    part = options.own_shard(shard)
    loaded = load_base(read.base, **loading.base_options(device, dtype, None, trust_remote_code))
    comparison = Comparison(read, loaded, output, part)
    comparison.run()
    if several:
        ranks.leave()
        if part[0] > 1:
            return
        comparison = Comparison(read, loaded, output)  # reads what the others did
    elif shard is not None:
        print(f"shard {shard} is done; run without --shard when all are", file=sys.stderr)
        return
    command = ["hyperlora", "compare", str(experiment), "-o", str(output)]
    for option, value in (("--base", base), ("--device", device), ("--dtype", dtype)):
        command += [option, value] if value is not None else []
    command += ["--trust-remote-code"] * trust_remote_code
    for path in comparison.report(shlex.join(command)):
        print(path)
