"""The fused attention kernel of a CPU against plain products, forward and back, by the length of the sequences.

    python eval/bench/attention.py --dtype bfloat16

Prints the median milliseconds of interleaved rounds and their ratio; above 1 the products are faster. The kernels
are handed a mask, as packed questions need one. hyperlora/attention.py goes by this.
"""

import argparse
import json
import statistics
import time

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "products": SDPBackend.MATH}


def milliseconds(kernel: SDPBackend, sides: list[Tensor], mask: Tensor) -> float:
    """Of one forward pass and the way back."""
    start = time.perf_counter()
    with sdpa_kernel([kernel]):
        scaled_dot_product_attention(*sides, attn_mask=mask).sum().backward()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[48, 96, 144, 160, 192, 256, 512])
    parser.add_argument("--padded", type=int, default=768, help="tokens of a batch")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    settings = parser.parse_args()
    dtype = getattr(torch, settings.dtype)
    for tokens in settings.tokens:
        shape = (max(1, settings.padded // tokens), settings.heads, tokens, settings.head_dim)
        sides = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
        unseen = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mask = torch.zeros(shape[0], 1, tokens, tokens, dtype=dtype).masked_fill(unseen, float("-inf"))
        taken: dict[str, list[float]] = {name: [] for name in KERNELS}
        for number in range(settings.rounds + 2):
            for name, kernel in KERNELS.items():
                passed = milliseconds(kernel, sides, mask)
                if number > 1:  # the first ones set up
                    taken[name].append(passed)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        ratio = medians["fused"] / medians["products"]
        print(json.dumps({"tokens": tokens, "sequences": shape[0]} | medians | {"ratio": ratio}), flush=True)


if __name__ == "__main__":
    main()
