"""Independent keys against competing ones, untrained: does a patch store its document, and does it disturb other text?

    HYPERLORA_DATA=... python eval/bench/keys.py

Copy slots alone (value: c |h| times the next token's unembedding), rank 64, on SQuAD paragraphs cut to 160 tokens.
Prints the mean loss (nats per token) on the document's own text and on an unrelated WikiText piece, bare and for each
kind of key.
"""

import argparse
import random
from collections.abc import Callable

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.data.mix import window
from hyperlora.data.sources import load
from hyperlora.generator import Generator
from hyperlora.hypernet.slots import compete
from hyperlora.inject import inject
from hyperlora.rank_cap import cap_rank
from hyperlora.statistics import SecondMoment

# Inputs and values of a document's tokens, second moment -> A (1, tokens, d_in), columns of B (1, tokens, d_out).
Slots = Callable[[Tensor, Tensor, SecondMoment], tuple[Tensor, Tensor]]


def independent(x: Tensor, values: Tensor, moment: SecondMoment) -> tuple[Tensor, Tensor]:
    """Keys C^-1 x_t / (x_t^T C^-1 x_t), for each token on its own."""
    toward = moment.solve(x)
    return toward / (toward * x).sum(-1, keepdim=True), values


def competing(ridge: float) -> Slots:
    def slots(x: Tensor, values: Tensor, moment: SecondMoment) -> tuple[Tensor, Tensor]:
        toward = moment.solve(x)
        return toward, compete(x, toward, values, torch.tensor(ridge))

    return slots


@torch.no_grad()
def loss(base: BaseModel, ids: list[int]) -> float:
    tokens = torch.tensor([ids], device=base.device)
    return float(base.model(tokens, labels=tokens, use_cache=False).loss)


@torch.no_grad()
def measure(generator: Generator, documents: list[list[int]], others: list[list[int]], slots: Slots, c: float) -> tuple:
    sink, own, other = generator.encoder.sink, 0.0, 0.0
    for document, unrelated in zip(documents, others, strict=True):
        features = generator.encoder.read([document])
        factors = {}
        for site, x, stat in zip(generator.sites, features.inputs, generator.statistics, strict=True):
            values = c * stat.residual_norm / stat.gain * features.following
            a, b = slots(x, values, stat.moment)
            factors[site.path] = cap_rank(a, b.mT, generator.config.rank, b.mT @ stat.moment.factor(a))
        with inject(generator.base.model, factors):
            own += loss(generator.base, sink + document) / len(documents)
            other += loss(generator.base, sink + unrelated) / len(documents)
    return own, other


def samples(generator: Generator, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of `count` SQuAD paragraphs and of as many unrelated WikiText pieces."""
    rng, tokenize = random.Random(0), generator.encoder.tokenize
    paragraphs, articles = load("squad_dev"), load("wikitext2_valid")
    documents = [tokenize(item.text)[:160] for item in paragraphs[:: len(paragraphs) // count][:count]]
    texts = [window(generator.base.tokenizer, rng.choice(articles).text, rng, 160, 0)[0] for _ in documents]
    return documents, [tokenize(text) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=16)
    options = parser.parse_args()
    generator = Generator.from_pretrained()
    base = generator.base
    documents, others = samples(generator, options.items)
    sink = generator.encoder.sink
    bare = [sum(loss(base, sink + ids) for ids in texts) / len(texts) for texts in (documents, others)]
    print(
        f"| keys | c | own text | unrelated text |\n|---|---|---|---|\n| bare model | | {bare[0]:.3f} | {bare[1]:.3f} |"
    )
    kinds = {"independent": independent} | {f"competing, ridge {r}": competing(r) for r in (0.3, 1.0, 3.0)}
    for name, slots in kinds.items():
        for c in (0.05, 0.15):
            own, other = measure(generator, documents, others, slots, c)
            print(f"| {name} | {c} | {own:.3f} | {other:.3f} |", flush=True)


if __name__ == "__main__":
    main()
