"""What each piece of a trained associative generator is worth: scores with one piece taken out, without retraining.

    HYPERLORA_DATA=... python eval/bench/ablation.py

Prints, for the whole generator, the exact match of two facts of kinds that no recipe trains on, the F1 on SQuAD
paragraphs above that of the swapped patch, and what a patch costs on unrelated text (nats per token); and without each
piece in turn the differences of the first two (paired by document), each with its 95 % interval. Without strengths of
their own all slots are equally strong, so that the first tokens of a document have the pointers.
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item
from hyperlora.evaluation.bootstrap import interval
from hyperlora.evaluation.controls import answer
from hyperlora.evaluation.items import fact_items, qa_items
from hyperlora.evaluation.metrics import exact_match, f1
from hyperlora.evaluation.report import evaluate_forgetting
from hyperlora.generator import Generator
from hyperlora.hypernet import Associative

Change = Callable[[Associative], None]


def silence(value: nn.Module) -> None:
    """Slots of no strength, so that columns of B are zero."""
    value.gate.weight.zero_()  # type: ignore[operator, union-attr]
    value.gate.bias.fill_(-torch.inf)  # type: ignore[operator, union-attr]


def without(ending: str) -> Change:
    """Zero all parameters whose names end so."""

    def change(hypernet: Associative) -> None:
        for name, parameter in hypernet.named_parameters():
            if name.endswith(ending):
                parameter.zero_()

    return change


def without_slots(*kinds: str, site: int | None = None) -> Change:
    """Silence slots, of one site or of all."""

    def change(hypernet: Associative) -> None:
        for kind in kinds:
            for index, value in enumerate(getattr(hypernet, kind)):
                if site in (None, index):
                    silence(value)

    return change


def pieces(sites: list[str]) -> Iterator[tuple[str, Change]]:
    """Names of pieces, and what takes each out of a hypernetwork."""
    yield "copy slots", without_slots("copy")
    yield "pointer slots", without_slots("point")
    yield "unembeddings (c)", without(".scale")
    yield "learned values (W)", without(".learned.weight")
    yield "strengths of their own (g)", without(".gate.weight")
    yield "moved keys of copies", without(".to_copies.weight")
    yield "moved keys of pointers", without(".to_pointers.weight")
    yield "adapter", without("adapter_b")
    for index, site in enumerate(sites):
        yield site, without_slots("copy", "point", site=index)


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


@torch.no_grad()
def measure(folder: str | None, base: BaseModel, change: Change, count: int) -> tuple[np.ndarray, np.ndarray, str]:
    generator = Generator.from_pretrained(folder, base)
    assert isinstance(generator.hypernet, Associative), "only an associative generator has these pieces"
    change(generator.hypernet)
    facts = scores(generator, fact_items(2, count, new_attributes=True), exact_match, swapped=False)
    squad = scores(generator, qa_items("squad_dev", base, 200, count), f1, swapped=True)
    forgotten = evaluate_forgetting(generator, "wikitext2_valid", count)["scores"]["patch - bare"]["loss"]
    return facts, squad, shown(forgotten)


def shown(cell: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator")
    parser.add_argument("--items", type=int, default=100, help="documents of each kind")
    options = parser.parse_args()
    whole = Generator.from_pretrained(options.generator)
    facts, squad, forgotten = measure(options.generator, whole.base, lambda _: None, options.items)
    print("| without | two facts, new kinds | SQuAD F1 - swapped | unrelated loss |\n|---|---|---|---|")
    print(f"| nothing: | {shown(interval(facts))} | {shown(interval(squad))} | {forgotten} |", flush=True)
    for name, change in pieces([site.path for site in whole.sites]):
        less_facts, less_squad, forgotten = measure(options.generator, whole.base, change, options.items)
        cells = [shown(interval(less_facts - facts)), shown(interval(less_squad - squad)), forgotten]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
