"""What storing the second moment as a diagonal and a few directions costs, against the whole matrix.

    HYPERLORA_DATA=... python eval/bench/moment.py

Untrained copy slots (ridge 0.3, c 0.15, rank 64) as in keys.py, with the statistics measured once on WikiText-2 train
text. Prints, for each number of directions, what the statistics weigh in a file and the mean loss (nats per token) on
the document's own text and on unrelated text.
"""

import argparse
import random

import torch
from keys import competing, measure, samples

from hyperlora.base_model import load_base
from hyperlora.data.mix import window
from hyperlora.data.sources import load
from hyperlora.generator import Generator
from hyperlora.generator_config import GeneratorConfig
from hyperlora.statistics import SecondMoment, SiteStatistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--texts", type=int, default=32)
    options = parser.parse_args()
    base, rng = load_base(), random.Random(0)
    width = max(site.d_in for site in Generator(base, GeneratorConfig()).sites)
    generator = Generator(base, GeneratorConfig(moment_directions=width))  # the whole matrix
    articles = load("wikitext2_train")
    picked = [rng.choice(articles).text for _ in range(options.texts)]
    generator.calibrate([window(base.tokenizer, text, rng, 384, 0)[0] for text in picked])
    ridge = generator.config.ridge
    whole = []  # without the ridge, which `fit` adds
    for stat in generator.statistics:
        dense = stat.moment.dense()
        whole.append(dense - ridge / (1 + ridge) * dense.diagonal().mean() * torch.eye(len(dense)))
    documents, others = samples(generator, options.items)
    print("| directions | MB | own text | unrelated text |\n|---|---|---|---|")
    for directions in (0, 8, 32, 128, width):
        for site, stat, moment in zip(generator.sites, generator.statistics, whole, strict=True):
            assert isinstance(stat, SiteStatistics)
            stat.moment = SecondMoment(site.d_in, directions)
            stat.moment.fit(moment, ridge)
        size = sum(tensor.nbytes for tensor in generator.statistics.state_dict().values()) / 1e6
        own, other = measure(generator, documents, others, competing(0.3), 0.15)
        print(f"| {directions} | {size:.1f} | {own:.3f} | {other:.3f} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
