"""What importing hyperlora costs beyond torch and transformers, which it is made of.

    python eval/bench/imports.py

Prints the median time of each import over fresh, interleaved processes, and its ratio to that of torch + transformers.
The bar for the public names is 1.3. `import hyperlora` alone loads nothing until a name is used.
"""

import argparse
import json
import statistics
import subprocess
import sys

BASE = "torch + transformers"
IMPORTS = {
    BASE: "import torch, transformers",
    "hyperlora": "import hyperlora",
    "its public names": "from hyperlora import Generator, Patch, load_base, patched",
}


def seconds(code: str) -> float:
    """Time of an import in a process of its own, the start of the interpreter excluded."""
    timed = f"import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", timed], check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(rounds + 1):
        for name, code in IMPORTS.items():
            taken = seconds(code)
            if number:  # the first round fills the disk cache
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(json.dumps({"import": name, "seconds": round(median, 3), "ratio": round(median / medians[BASE], 3)}))


if __name__ == "__main__":
    main()
