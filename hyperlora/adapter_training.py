"""Train one LoRA for all documents, with the document in the prompt: the adapted full context.

It sees the questions that a generator's recipe draws, in the same order and for as many updates, so that what a
generator gains beyond it is not the form of the answers. The learning rate is the best of several on held-out
documents.
"""

import json
import math
import random
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hyperlora import checkpoint
from hyperlora.attention import attention
from hyperlora.base_model import BaseModel
from hyperlora.checkpoint import Checkpoint, load_moments, save_moments
from hyperlora.data.items import Item
from hyperlora.data.mix import Mix
from hyperlora.errors import InputError
from hyperlora.files import write_text
from hyperlora.generator import Generator
from hyperlora.generator_files import stored_config
from hyperlora.groups import cheapest_groups
from hyperlora.learning_rates import cosine
from hyperlora.methods.adapted import fresh_adapter
from hyperlora.packing import Packed, pack_alike, stacked
from hyperlora.recipe import Recipe
from hyperlora.session import Session
from hyperlora.shared_state import SharedState

_HELD_OUT = 20  # one document in so many validates
_VALIDATION = 64  # documents
_BATCH = 8  # rows at once in validation


class Adapter(nn.Module):
    """LoRA factors of one shared patch as parameters: the modules and ranks of a patch of the recipe's generator."""

    def __init__(self, base: BaseModel, recipe: Recipe):
        super().__init__()
        config = stored_config(recipe.start_from, recipe.generator)
        generator = Generator(base, config)  # for its modules alone
        alike = generator.hypernet.fixed, generator.hypernet.fixed_rank
        fresh: dict[str, tuple[Tensor, Tensor]] = {}
        for modules, rank in ((generator.sites, config.rank), alike):
            fresh |= fresh_adapter(base, rank, modules, recipe.seed)
        self.paths = list(fresh)
        self.ranks = {path: a.shape[1] for path, (a, _) in fresh.items()}  # by module
        self.a = nn.ParameterList(a.detach() for a, _ in fresh.values())
        self.b = nn.ParameterList(b.detach() for _, b in fresh.values())

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return dict(zip(self.paths, zip(self.a, self.b, strict=True), strict=True))


def train_adapter(
    recipe: Recipe, base: BaseModel, rates: Sequence[float], folder: Path, sweep_steps: int | None = None
) -> dict[str, float]:
    """Train with every learning rate in `folder`/rate-*, keep the best in `folder`/adapter; resumes where it stopped.

    Args:
        sweep_steps: compare the learning rates after so many steps of the recipe's schedule, and train only the best
            to its end; default all.

    Returns:
        validation loss, nats per label token, by learning rate, and `adapter`, of the one that is kept; also written
        to sweep.json.

    Raises:
        InputError: a rate that is not positive, the recipe asks no questions about documents, or the folder holds
            another recipe's run.
    """
    if wrong := [rate for rate in rates if not 0 < rate < math.inf]:
        raise InputError(f"--rates: {wrong[0]:g} is no learning rate; give positive numbers")
    found = {rate: _swept(recipe, base, rate, folder / f"rate-{rate:g}", sweep_steps) for rate in rates}
    best = min(found, key=lambda rate: found[rate])
    adapter = _train(recipe, base, best, folder / f"rate-{best:g}")
    losses = {f"{rate:g}": loss for rate, loss in found.items()}
    losses["adapter"] = validation_loss(recipe, base, adapter)
    SharedState("adapted_full", adapter=adapter.factors()).save(folder / "adapter", base, force=True)
    write_text(folder / "sweep.json", json.dumps(losses, indent=1) + "\n")
    return losses


def _swept(recipe: Recipe, base: BaseModel, rate: float, folder: Path, steps: int | None) -> float:
    """Validation loss at the end of the sweep; written down, because the best run goes on beyond it."""
    path, until = folder / "sweep.json", min(steps or recipe.steps, recipe.steps)
    if path.exists() and (kept := json.loads(path.read_text()))["steps"] == until:
        return float(kept["loss"])
    loss = validation_loss(recipe, base, _train(recipe, base, rate, folder, until))
    write_text(path, json.dumps({"steps": until, "loss": loss}) + "\n")
    return loss


def held_out(item: Item) -> bool:
    """Whether a document is kept from training, with all pieces that are cut from it (`id@number`)."""
    return zlib.crc32(item.id.split("@")[0].encode()) % _HELD_OUT == 0


def _train(recipe: Recipe, base: BaseModel, rate: float, folder: Path, until: int | None = None) -> Adapter:
    """Train from where the folder's checkpoint stands to step `until` of the recipe's schedule."""
    until = min(until or recipe.steps, recipe.steps)
    adapter, mix = Adapter(base, recipe), Mix(list(recipe.mix), recipe.seed, base.tokenizer)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate, weight_decay=recipe.weight_decay)
    settings = recipe.model_dump(mode="json", include={"base", "seed", "documents", "mix"})
    settings |= {"rate": rate, "ranks": adapter.ranks}
    step = 0
    if (found := checkpoint.find(folder)) is not None:
        loaded = checkpoint.load(found)
        if loaded.position["settings"] != settings:
            raise InputError(f"{folder} holds another recipe's run; choose another -o")
        loaded.restore(adapter)
        load_moments(optimizer, found)
        step, mix.state = loaded.position["step"], loaded.position["drawn"]
    bar = tqdm(total=until, initial=step, unit="step", desc=f"learning rate {rate:g}")
    while step < until:
        drawn = [mix.draw(step)[0] for _ in range(recipe.documents)]
        asked = [item for item in drawn if item.questions and not held_out(item)]
        if asked:
            for group in optimizer.param_groups:
                group["lr"] = cosine(rate, step, recipe.warmup, recipe.steps)
            packs, total = [_packed(base, item) for item in asked], 0.0
            labels = sum(len(replies) for _, replies in packs)
            for numbers in cheapest_groups([packed.ids.shape[1] for packed, _ in packs], base.device):
                loss = _surprise(base, adapter, [packs[number] for number in numbers]) / labels
                loss.backward()
                total += float(loss.detach())
            nn.utils.clip_grad_norm_(adapter.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{total:.3f}")
        step += 1
        bar.update()
        if step % recipe.save_every == 0 or step == until:
            position = {"step": step, "drawn": mix.state, "settings": settings}
            made = Checkpoint(adapter.state_dict(), position)

            def write(partial: Path, made: Checkpoint = made) -> None:
                made.write(partial)
                save_moments(optimizer, partial)

            checkpoint.replace(folder, write)
    bar.close()
    return adapter


def _packed(base: BaseModel, item: Item) -> tuple[Packed, list[int]]:
    """An item's questions behind its document, which is read once, and the tokens of their replies."""
    tokenizer = base.tokenizer
    prompts = [base.prompt.prompt_ids(tokenizer, question.text, item.text) for question in item.questions]
    replies = [base.prompt.answer_ids(tokenizer, question.reply) for question in item.questions]
    packed = pack_alike(list(zip(prompts, replies, strict=True)), base.device)
    return packed, [token for reply in replies for token in reply]


def _surprise(base: BaseModel, adapter: Adapter, packs: Sequence[tuple[Packed, list[int]]]) -> Tensor:
    """Negative log-likelihood of the replies, summed over their tokens, in nats."""
    packed = stacked([packed for packed, _ in packs])
    targets = torch.tensor([token for _, replies in packs for token in replies], device=base.device)
    fast = attention(base, packed.ids.shape[1])
    with fast, Session(base, len(packs), factors=adapter.factors(), cached=False) as session:
        return F.cross_entropy(packed.logits(session), targets, reduction="sum")


@torch.no_grad()
def validation_loss(recipe: Recipe, base: BaseModel, adapter: Adapter) -> float:
    """Nats per label token on one question each of held-out documents."""
    documents = Mix(list(recipe.mix), recipe.seed, base.tokenizer).documents()
    found = {item.id: item for item in documents if item.questions and held_out(item)}
    if not found:
        raise InputError("the recipe has no documents with questions to choose a learning rate on; add a qa task")
    chosen = sorted(found, key=lambda name: zlib.crc32(name.encode()))[:_VALIDATION]
    rng = random.Random(recipe.seed)
    asked = [Item(name, found[name].text, (rng.choice(found[name].questions),)) for name in chosen]
    packs = [_packed(base, item) for item in asked]
    groups = [packs[start : start + _BATCH] for start in range(0, len(packs), _BATCH)]
    total = sum(float(_surprise(base, adapter, group)) for group in groups)
    return total / sum(len(replies) for _, replies in packs)
