"""Documents per second of the training loop against the straightforward one, in the same run, at equal gradients.

    python eval/bench/training.py train/default.yaml --steps 4
    python eval/bench/training.py train/facts.yaml --set documents=16

The straightforward loop takes one document at a time, reads it with a whole forward pass, computes logits at every
position and walks back through everything. Steps of both alternate on the same documents; the medians are compared. Two
controls are printed: the difference of the gradients, and how many operations the straightforward loop takes for one of
the loop, which is the ratio of the times where both compute equally fast. On a GPU the share of `--peak` TFLOP/s is
printed too.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from hyperlora.drawing import Micro, Step
from hyperlora.flop_counter import flop_counter
from hyperlora.hypernet import Features, Reading
from hyperlora.inject import inject
from hyperlora.objectives import Row
from hyperlora.recipe import Recipe, read_recipe
from hyperlora.structure import decoder_layers
from hyperlora.training import Trainer, start


class WholePass(Reading):
    """One document read in a forward pass through all layers and the output layer."""

    def __init__(self, run: Trainer, ids: list[int]):
        self.run, self.ids = run, ids

    @property
    def features(self) -> Features:
        with torch.no_grad():
            return self._read()

    def adapted(self, adapter: Mapping[str, tuple[Tensor, Tensor]]) -> Features:
        with inject(self.run.base.model, adapter):
            return self._read()

    def memory(self, tokens: Tensor, adapter: Mapping[str, tuple[Tensor, Tensor]], layers: Sequence[int]) -> Tensor:
        encoder, base = self.run.generator.encoder, self.run.base
        embeds = base.model.get_input_embeddings()(torch.tensor([encoder.sink + self.ids], device=base.device))
        size = embeds[:, len(encoder.sink) :].float().square().mean().sqrt()
        embeds = torch.cat([embeds, (size * tokens)[None].to(embeds.dtype)], dim=1)
        with inject(base.model, adapter):
            behind, _ = self._whole(inputs_embeds=embeds)
        return torch.stack([behind[layer][:, -len(tokens) :].float() for layer in layers], dim=1)

    def _read(self) -> Features:
        encoder, base = self.run.generator.encoder, self.run.base
        last = max(site.layer for site in encoder.sites)
        tokens = torch.tensor([encoder.sink + self.ids], device=base.device)
        behind, inputs = self._whole(input_ids=tokens)
        skip = len(encoder.sink)
        hidden = torch.stack([behind[-1], behind[last // 2 - 1], behind[last]], dim=2)
        words = F.normalize(base.model.get_output_embeddings().weight[tokens[:, skip:]].float(), dim=-1)
        return Features(
            inputs=[x[:, skip:].float() for x in inputs],
            hidden=hidden[:, skip:].float(),
            words=words,
            following=torch.cat([words[:, 1:], torch.zeros_like(words[:, :1])], dim=1),
            mask=torch.ones_like(tokens[:, skip:], dtype=torch.bool),
        )

    def _whole(self, **read: Tensor) -> tuple[dict[int, Tensor], list[Tensor]]:
        """States behind each layer (-1: before the first), and inputs of the sites, of a whole forward pass."""
        base = self.run.base
        blocks = decoder_layers(base.model)[1]
        inputs: list[Tensor] = []
        behind: dict[int, Tensor] = {}
        handles = [
            base.model.get_submodule(site.path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            for site in self.run.generator.encoder.sites
        ]

        def keep(number: int) -> Any:
            def hook(_: Any, __: Any, output: Any) -> None:
                behind[number] = output[0] if isinstance(output, tuple) else output

            return hook

        def enter(_: Any, args: Any, kwargs: Any) -> None:
            behind[-1] = args[0] if args else kwargs["hidden_states"]

        handles += [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
        handles.append(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
        base.model(**read, use_cache=False)
        for handle in handles:
            handle.remove()
        return behind, inputs


def straightforward(run: Trainer, drawn: Micro) -> None:
    """The gradient of a step, document by document."""
    model, weight = run.base.model, run.recipe.unrelated.weight if run.recipe.unrelated else 0.0
    prompt_weight = run.recipe.beside.weight if run.recipe.beside else 0.0
    labels, prompts, others = (max(1, sum(row.labels for row in rows)) for rows in drawn[1:])

    def logits(row: Row) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([row.ids], device=run.base.device)
        found = model(input_ids=ids, use_cache=False).logits[0].float()
        return found[row.start - 1 : -1], ids[0, row.start :]

    for number, item in enumerate(drawn.items):
        rows, beside, unrelated = ([row for row in found if row.document == number] for found in drawn[1:])
        written = run.generator.hypernet(
            WholePass(run, run.generator.encoder.tokenize(item.text)), run.generator.statistics
        )
        capped = run.generator._capped(written, run.generator.config.rank)
        changed = [*run.generator.sites, *run.generator.hypernet.fixed]
        factors = {site.path: pair for site, pair in zip(changed, capped, strict=True)}
        with torch.no_grad():
            bare = [logits(row)[0] for row in unrelated]
        with inject(model, factors):
            loss = sum((F.cross_entropy(*logits(row), reduction="sum") / labels for row in rows), torch.zeros(()))
            for row in beside:
                loss = loss + prompt_weight * F.cross_entropy(*logits(row), reduction="sum") / prompts
            for row, before in zip(unrelated, bare, strict=True):
                drift = F.kl_div(
                    logits(row)[0].log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True
                )
                loss = loss + weight * drift / others
            loss.backward()


def gradients(run: Trainer) -> Tensor:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.generator.hypernet.parameters()]
    run.generator.hypernet.zero_grad()
    return torch.cat([gradient.flatten() for gradient in found])


def operations(run: Trainer, drawn: list[Micro]) -> dict[str, int]:
    """Floating-point operations of both loops on the same steps."""
    run.steps = (Step([micro], run.drawing.position) for micro in drawn)
    with flop_counter() as loop:
        for _ in drawn:
            run.train_step()
    with flop_counter() as plain:
        for micro in drawn:
            straightforward(run, micro)
    run.generator.hypernet.zero_grad()
    return {"loop": loop.get_total_flops(), "straightforward": plain.get_total_flops()}


def measure(recipe: Recipe, steps: int, peak: float | None, dtype: torch.dtype | None = None) -> dict[str, Any]:
    recipe = recipe.model_copy(update={"micro_batches": 1, "clip": 1e9})
    recipe.evaluation.facts, recipe.evaluation.qa = [], []
    folder = Path(tempfile.mkdtemp()) / "run"
    folder.mkdir()
    run = start(recipe, folder, "bench", dtype=dtype)
    caught: list[Tensor] = []
    run.engine.step = lambda rates: caught.append(gradients(run)) or 0.0  # type: ignore[func-returns-value]
    drawing = run.drawing.steps(0)
    seconds: dict[str, list[float]] = {"loop": [], "straightforward": []}
    differences, timed = [], []
    for number in range(steps + 1):  # the first warms up
        drawn = next(drawing)  # here, so that both loops get the same
        run.steps = (step for step in [drawn])
        begin = run.base.now()
        run.train_step()
        middle = run.base.now()
        straightforward(run, drawn.micro[0])
        end = run.base.now()
        plain = gradients(run)
        if number:
            timed.append(drawn.micro[0])
            seconds["loop"].append(middle - begin)
            seconds["straightforward"].append(end - middle)
            differences.append(float((caught[-1] - plain).norm() / plain.norm()))
    counted = operations(run, timed)
    per_second = {name: recipe.documents / statistics.median(values) for name, values in seconds.items()}
    return {
        "documents_per_second": per_second,
        "ratio": per_second["loop"] / per_second["straightforward"],
        "operations_ratio": counted["straightforward"] / counted["loop"],
        "gradient_difference": max(differences),
        **({"share_of_peak": counted["loop"] / sum(seconds["loop"]) / 1e12 / peak} if peak else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", help="of the base, such as bfloat16")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the GPU; prints the share of it that the loop reaches")
    parser.add_argument("--set", action="append", default=[], help="key=value of the recipe, in YAML")
    options = parser.parse_args()
    changes = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in options.set)}
    dtype = getattr(torch, options.dtype) if options.dtype else None
    print(json.dumps(measure(read_recipe(options.recipe, **changes), options.steps, options.peak, dtype)))


if __name__ == "__main__":
    main()
