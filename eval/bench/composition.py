"""What composing patches at a constant rank keeps of each document, and what it does to unrelated text.

    HYPERLORA_DATA=... python eval/bench/composition.py

Documents of two invented facts join one after another; their patches are composed with and without a limit on the norm,
or one patch is made of all of them (`Generator.generate_together`). Prints, for each number of documents, the exact
match on all of them and on the first one, and the rise of the loss on WikiText-2 validation text in nats per token.
Means with 95 % intervals over groups of documents that share none.
"""

import argparse
import random
from collections.abc import Callable

from hyperlora.data.mix import window
from hyperlora.data.sources import load
from hyperlora.evaluation.bootstrap import interval
from hyperlora.evaluation.items import fact_items
from hyperlora.evaluation.metrics import exact_match
from hyperlora.generator import Generator
from hyperlora.memory import Memory
from hyperlora.patch import Patch
from hyperlora.runtime import Runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator")
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--documents", type=int, default=16, help="in a group, a power of two")
    parser.add_argument("--texts", type=int, default=4, help="unrelated ones")
    options = parser.parse_args()
    generator = Generator.from_pretrained(options.generator)
    base, runtime, rank, rng = generator.base, Runtime(generator.base), generator.config.rank, random.Random(0)
    articles = load("wikitext2_valid")
    pool = fact_items(2, options.groups * options.documents)
    groups = [pool[first : first + options.documents] for first in range(0, len(pool), options.documents)]
    patches = [generator.generate([item.text for item in group]) for group in groups]
    texts = [window(base.tokenizer, rng.choice(articles).text, rng, 256, 0)[0] for _ in range(options.texts)]

    def loss(memories: list[Memory]) -> list[float]:
        prompts = [runtime.continuation(number, text) for number in range(len(memories)) for text in texts]
        found = [-float(part.mean()) for part in runtime.log_likelihood(memories, prompts)]
        return [sum(found[i : i + len(texts)]) / len(texts) for i in range(0, len(found), len(texts))]

    (bare,) = loss([Memory()])

    def composed(limit: float | None) -> Callable[[int], list[Patch]]:
        return lambda count: [Patch.compose(p[:count], rank=rank, norm_limit=limit) for p in patches]

    def together(count: int) -> list[Patch]:
        return [generator.generate_together([item.text for item in group[:count]]) for group in groups]

    print("| joined by | documents | all of them | the first | unrelated text |\n|---|---|---|---|---|")
    ways = {"sum": composed(None), "sum, norm limit 2": composed(2), "sum, norm limit 1": composed(1)}
    for name, join in (ways | {"slots that compete": together}).items():
        count = 1
        while count <= options.documents:
            memories = [Memory(patch=patch) for patch in join(count)]
            asked = [
                (number, question)
                for number, group in enumerate(groups)
                for item in group[:count]
                for question in item.questions
            ]
            prompts = [runtime.question(number, question.text) for number, question in asked]
            replies = runtime.generate(memories, prompts, 24)
            right = [exact_match(reply, q.accepted) for reply, (_, q) in zip(replies, asked, strict=True)]
            kept = [[x for x, (n, _) in zip(right, asked, strict=True) if n == number] for number in range(len(groups))]
            every = [sum(own) / len(own) for own in kept]
            first = [sum(own[:2]) / 2 for own in kept]
            rise = [value - bare for value in loss(memories)]
            cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in map(interval, (every, first, rise))]
            print(f"| {name} | {count} | {' | '.join(cells)} |", flush=True)
            count *= 2


if __name__ == "__main__":
    main()
