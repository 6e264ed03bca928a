"""Where does a base tell the facts of a document apart? Untrained keys at the output projections of every layer.

    HYPERLORA_DATA=... python eval/bench/sites.py

Documents of invented facts of kinds that no training uses. The bare model, without the document, is about to say a
value ("Zorbala's village is"); what a projection sees there is held against ridge keys over what it saw in the
document. Prints how often the strongest response, among the tokens right before the document's values, is that of the
fact, of a fact about the same name, of a fact of the same kind. By chance about one in eight facts, one in four names.
"""

import argparse
import random
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel, load_base
from hyperlora.data.facts import fact_document
from hyperlora.data.items import Item, Question
from hyperlora.data.sources import load
from hyperlora.encoder import Encoder
from hyperlora.hypernet.slots import compete
from hyperlora.prompt import document_ids
from hyperlora.statistics import SiteStatistics, calibrate
from hyperlora.structure import attention_outputs, decoder_layers, find_sites

RIDGE, DIRECTIONS = 0.3, 32


class Fact(NamedTuple):
    """`place`: of the token right before the value; `prompt`: what a reply has said when the value comes."""

    name: str
    kind: str
    place: int
    prompt: list[int]


def locate(base: BaseModel, item: Item, question: Question) -> Fact | None:
    """The fact that a question is about; None where its value stands twice in the document, or at its start."""
    value = question.accepted[1]
    name, _, rest = question.reply.partition("'s ")
    place = len(document_ids(base.tokenizer, item.text.partition(value)[0].rstrip())) - 1
    if item.text.count(value) != 1 or place < 0:
        return None
    said = document_ids(base.tokenizer, question.reply[: question.reply.rindex(value)].rstrip())
    return Fact(name, rest.partition(" is ")[0], place, base.prompt.prompt_ids(base.tokenizer, question.text) + said)


def responses(x: Tensor, document: Tensor, stat: SiteStatistics) -> Tensor:
    """Of the document's tokens (tokens, d_in) to the input x (d_in,): (tokens,)."""
    rows = stat.moment.solve(document)  # type: ignore[operator, union-attr]
    matches = (rows @ x)[None, :, None]
    return compete(document[None], rows[None], matches, torch.tensor(RIDGE))[0, :, 0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--texts", type=int, default=24, help="to calibrate on")
    options = parser.parse_args()
    base = load_base(options.base)
    layers = list(range(len(decoder_layers(base.model)[1])))
    kinds = {"attention": attention_outputs(base.model, layers), "MLP": find_sites(base.model, layers)}
    sites = [site for found in kinds.values() for site in found]
    encoder, statistics = Encoder(base, sites), [SiteStatistics(site, DIRECTIONS) for site in sites]
    texts = random.Random(0).sample(
        [item.text for name in ("wikitext2_train", "c4") for item in load(name)], options.texts
    )
    calibrate(base, sites, statistics, [encoder.sink + encoder.tokenize(text)[:400] for text in texts], 0.05)

    found, asked = Counter(), 0
    for number in range(options.items):
        item = fact_document(f"sites-{number}", options.facts, "test", new_attributes=True)
        facts = [fact for question in item.questions if (fact := locate(base, item, question))]
        document = encoder.read([encoder.tokenize(item.text)]).inputs
        for fact in facts:
            asked += 1
            replies = encoder.read([fact.prompt[len(encoder.sink) :]]).inputs
            for site, stat, x, own in zip(sites, statistics, replies, document, strict=True):
                response = responses(x[0, -1], own[0], stat)
                best = max(facts, key=lambda other: float(response[other.place]))
                found[site.path, "fact"] += best == fact
                found[site.path, "name"] += best.name == fact.name
                found[site.path, "kind"] += best.kind == fact.kind
    columns = [f"{label}: {what}" for label in kinds for what in ("fact", "name", "kind")]
    print(f"{asked} facts\n\n| layer | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for layer in layers:
        paths = [next(site.path for site in of if site.layer == layer) for of in kinds.values()]
        cells = [f"{found[path, what] / asked:.2f}" for path in paths for what in ("fact", "name", "kind")]
        print(f"| {layer} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
