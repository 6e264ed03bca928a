"""What each piece of a trained associative generator is worth: scores with one piece taken out, without retraining.

    HYPERLORA_DATA=... python eval/bench/ablation.py

Prints, for the whole generator, the exact match of eight facts of kinds that no recipe trains on, the F1 on SQuAD
paragraphs above that of the swapped patch, and what a patch costs on unrelated text (nats per token), plain and where a
prompt has its document; and without each piece in turn the differences of the first two (paired by document), each with
its 95 % interval. Without strengths of their own all slots are equally strong, so that the first tokens of a document
have the pointers.

Pieces that were trained together lean on each other: this overstates what those are worth that retraining could
replace. `adapter_rank`, `moves` and `pointers` 0, `modules` and `layers` in a recipe train without them.
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from hyperlora.data.items import Item
from hyperlora.evaluation.bootstrap import interval
from hyperlora.evaluation.controls import answer
from hyperlora.evaluation.items import fact_items, qa_items
from hyperlora.evaluation.metrics import exact_match, f1
from hyperlora.evaluation.report import evaluate_forgetting
from hyperlora.generator import Generator
from hyperlora.hypernet import Associative

Change = Callable[[Generator, Associative], None]
READ = ("embedding", "middle state", "last state", "next token's embedding")  # what z is made of, in this order


def silence(value: nn.Module) -> None:
    """Slots of no strength, so that columns of B are zero."""
    value.gate.weight.zero_()  # type: ignore[operator, union-attr]
    value.gate.bias.fill_(-torch.inf)  # type: ignore[operator, union-attr]


def without(ending: str) -> Change:
    """Zero all parameters whose names end so."""

    def change(_: Generator, hypernet: Associative) -> None:
        for name, parameter in hypernet.named_parameters():
            if name.endswith(ending):
                parameter.zero_()

    return change


def without_slots(*kinds: str, site: int | None = None) -> Change:
    """Silence slots, of one site or of all."""

    def change(_: Generator, hypernet: Associative) -> None:
        for kind in kinds:
            for index, value in enumerate(getattr(hypernet, kind)):
                if site in (None, index):
                    silence(value)

    return change


def without_whitening(directions: bool) -> Change:
    """A second moment without its directions, or that of equal channels which do not depend on each other."""

    def change(generator: Generator, _: Associative) -> None:
        for stat in generator.statistics:
            channels = stat.moment.spread().square()
            stat.moment.weight.fill_(1e-12)
            stat.moment.diagonal.copy_(channels if directions else channels.mean().expand_as(channels))

    return change


def without_source(index: int) -> Change:
    """Zero what z sees of one of its sources."""

    def change(_: Generator, hypernet: Associative) -> None:
        hypernet.mix.weight.chunk(len(READ), dim=1)[index].zero_()

    return change


def at_rank(rank: int) -> Change:
    def change(generator: Generator, _: Associative) -> None:
        generator.config = generator.config.model_copy(update={"rank": rank})

    return change


def pieces(generator: Generator) -> Iterator[tuple[str, Change]]:
    """Names of pieces, and what takes each out of a generator."""
    yield "copy slots", without_slots("copy")
    yield "pointer slots", without_slots("point")
    yield "unembeddings (c)", without(".scale")
    yield "learned values (W)", without(".learned.weight")
    yield "strengths of their own (g)", without(".gate.weight")
    yield "moved keys of copies", without(".to_copies.weight")
    yield "moved keys of pointers", without(".to_pointers.weight")
    yield "adapter", without("adapter_b")
    yield "whitening between channels", without_whitening(directions=True)
    yield "whitening", without_whitening(directions=False)
    for index, name in enumerate(READ):
        yield f"z's {name}", without_source(index)
    for index, site in enumerate(generator.sites):
        yield site.path, without_slots("copy", "point", site=index)
    for rank in (generator.config.rank // 2, generator.config.rank // 4):
        yield f"all but {rank} ranks", at_rank(rank)


def scores(
    generator: Generator, items: list[Item], metric: Callable[[str, tuple[str, ...]], float], swapped: bool
) -> np.ndarray:
    """Per document, the mean over its questions of the metric with the patch, less that with the swapped patch."""
    replies = answer(generator, items, ("patch", "swapped") if swapped else ("patch",))
    asked = [(index, question.accepted) for index, item in enumerate(items) for question in item.questions]
    found: list[list[float]] = [[] for _ in items]
    for number, (index, accepted) in enumerate(asked):
        score = metric(replies["patch"][number], accepted)
        found[index].append(score - (metric(replies["swapped"][number], accepted) if swapped else 0))
    return np.array([sum(values) / len(values) for values in found])


class Bench:
    """The whole generator, and its scores with a piece taken out.

    Args:
        count: documents of each kind.
    """

    def __init__(self, generator: Generator, count: int):
        assert isinstance(generator.hypernet, Associative), "only an associative generator has these pieces"
        self.generator, self.hypernet, self.count = generator, generator.hypernet, count
        self.config = generator.config
        self.state = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
        self.facts = fact_items(8, count, new_attributes=True)
        self.squad = qa_items("squad_dev", generator.base, 200, count)

    @torch.no_grad()
    def measure(self, change: Change | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
        self.generator.config = self.config
        self.generator.load_state_dict(self.state)
        if change:
            change(self.generator, self.hypernet)
        facts = scores(self.generator, self.facts, exact_match, swapped=False)
        squad = scores(self.generator, self.squad, f1, swapped=True)
        rises = [
            evaluate_forgetting(self.generator, "wikitext2_valid", self.count, in_prompt)["scores"]["patch - bare"]
            for in_prompt in (False, True)
        ]
        return facts, squad, [shown(rise["loss"]) for rise in rises]


def shown(cell: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator")
    parser.add_argument("--items", type=int, default=100, help="documents of each kind")
    options = parser.parse_args()
    generator = Generator.from_pretrained(options.generator)
    bench = Bench(generator, options.items)
    facts, squad, rises = bench.measure()
    print("| without | eight facts, new kinds | SQuAD F1 - swapped | unrelated loss | in a prompt |")
    print("|---|---|---|---|---|")
    print("| " + " | ".join(["nothing:", shown(interval(facts)), shown(interval(squad)), *rises]) + " |", flush=True)
    for name, change in pieces(generator):
        less_facts, less_squad, rises = bench.measure(change)
        cells = [name, shown(interval(less_facts - facts)), shown(interval(less_squad - squad)), *rises]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
