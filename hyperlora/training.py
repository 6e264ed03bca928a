"""The training loop: draw documents, inject their patches, compare with the replies, checkpoint, resume."""

import math
import signal
import sys
import time
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint as checkpointed
from tqdm import tqdm

from hyperlora import attention, checkpoint, ranks, run_log
from hyperlora.activations import checkpoint_layers, stored
from hyperlora.base_model import load_base
from hyperlora.checkpoint import Checkpoint
from hyperlora.data.ahead import ahead
from hyperlora.data.calibration import calibration_texts
from hyperlora.data.overlap import check_disjoint
from hyperlora.drawing import Drawing, Position, Step
from hyperlora.engine import Engine, PlainEngine
from hyperlora.errors import InputError, OutOfMemory, TrainingDiverged, out_of_memory
from hyperlora.evaluation.controls import score_controls
from hyperlora.evaluation.items import evaluation_sets
from hyperlora.generator import Generator
from hyperlora.learning_rates import cosine, rated_groups
from hyperlora.leaves import joined, leaves_of
from hyperlora.recipe import Recipe
from hyperlora.resuming import check_own, data_hash, own_position
from hyperlora.run_log import RunLog
from hyperlora.student import Student
from hyperlora.trackers import WRITTEN

_SAME_REQUEST = 2.0  # seconds
_PATIENCE = 10  # steps in a row without a finite gradient before a run ends
_SHORTER = (
    "out of memory in the evaluation between steps; lower max_tokens, items or facts of the recipe's evaluation, and "
    "go on from the last checkpoint, which is intact"
)


class Trainer:
    """One run of a recipe in a folder: metrics.jsonl, checkpoint/ (generator, optimizer, position), generator/.

    Everything random is a function of the seed and of the number of items drawn, so that a resumed run repeats the
    losses of an uninterrupted one. Several processes share out the micro-batches of a step: their number changes
    nothing else.

    Args:
        zero: settings of DeepSpeed; None trains without it.

    Raises:
        InputError: the micro-batches cannot be shared out, the recipe trains a parameter that there is not, training
            data is in an evaluation set, or the checkpoint in the folder is of another engine.
    """

    def __init__(self, recipe: Recipe, generator: Generator, folder: Path, zero: dict[str, Any] | None = None):
        if recipe.micro_batches % ranks.count():
            raise InputError(
                f"micro_batches is {recipe.micro_batches}, which {ranks.count()} processes cannot share out; give a "
                "multiple of their number with --micro-batches"
            )
        self.recipe, self.generator, self.folder = recipe, generator, folder
        self.base = generator.base
        self.student = Student(self.base, recipe, generator.encoder.sink)
        if self.student.matched:
            self.student.measure(calibration_texts(recipe))
        self.drawing = Drawing(recipe, self.base, self.student)
        trained = self.drawing.mix.documents()
        self.student.check_taught(trained)
        self.evaluation = evaluation_sets(recipe.evaluation, self.base)
        trained += self.drawing.unrelated.items if self.drawing.unrelated else []
        self.own = own_position(recipe, generator, data_hash(trained, self.student.teachers))
        check_disjoint(trained, [item for items in self.evaluation.values() for item in items])
        self.engine = self._engine(zero)
        generator.through = self.engine.call
        if recipe.checkpointing:
            generator.through = partial(checkpointed, self.engine.call, use_reentrant=False)
            checkpoint_layers(self.base.model)
        self.log = RunLog(folder)
        self.step = 0
        self.skipped = 0
        self.steps: abc.Generator[Step, None, None] | None = None  # from here on

    def _engine(self, zero: dict[str, Any] | None) -> Engine:
        recipe, hypernet = self.recipe, self.generator.hypernet
        groups, self.rates = rated_groups(hypernet, recipe)
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        if zero is None:
            return PlainEngine(hypernet, optimizer, recipe.clip)
        from hyperlora.zero import ZeroEngine

        return ZeroEngine(hypernet, optimizer, zero, checkpoint.find(self.folder))

    # -- one step ---------------------------------------------------------------------------------------------------

    @sdpa_kernel(attention.TRAINING)
    def train_step(self) -> dict[str, float]:
        """One optimizer step over `micro_batches` batches; returns its metrics (losses in nats per token)."""
        if self.steps is None:
            draw = partial(self.drawing.steps, self.step)
            # On the CPU another process would take from what trains.
            self.steps = ahead(draw) if self.base.device.type == "cuda" else draw()
        micro, self.drawing.position = next(self.steps)
        # Divided by the labels of all micro-batches, so that the split changes nothing.
        _, *kinds = zip(*micro, strict=True)
        counted = ranks.total([sum(row.labels for rows in kind for row in rows) for kind in kinds])
        labels, prompts, others = map(int, counted)
        totals = {"loss": 0.0, "unrelated": 0.0} | ({"hidden": 0.0} if self.student.matched else {})
        totals |= {"beside": 0.0} if self.recipe.beside else {}
        for number, part in enumerate(micro, 1):
            read = [self.generator.encoder.tokenize(item.text) for item in part.items]
            factors = self.generator.factors(read, calls=ranks.most(self.generator.calls(read)))
            # Leaves in the place of A and B: each loss runs backward inside its own injection, which activation
            # checkpointing needs, and the graph behind the factors is walked once.
            leaves = leaves_of(factors)
            for name, loss in self.student.losses(leaves, part.rows, labels).items():
                totals[name] += loss
            if part.beside:
                totals["beside"] += self.student.misled(leaves, part.beside, prompts)
            if part.unrelated:
                totals["unrelated"] += self.student.drift(leaves, part.unrelated, others)
            self.engine.backward(joined(factors, leaves), last=number == len(micro))
        recipe = self.recipe
        norm = self.engine.step([cosine(rate, self.step, recipe.warmup, recipe.steps) for rate in self.rates])
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped == _PATIENCE:
            raise TrainingDiverged(
                f"gradients were not finite in {_PATIENCE} steps running; lower learning_rate and go on from the last "
                "checkpoint"
            )
        self.step += 1
        losses = dict(zip(totals, ranks.total(list(totals.values())), strict=True))
        return {**losses, "gradient_norm": norm, "labels": labels}

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self, on_metrics: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Train to the last step, saving on the way. Ctrl-C and SIGTERM save before they end the run."""
        stop: list[float] = []  # when

        def request_stop(*_: Any) -> None:
            # Asked twice: do not wait for the step to end. A launcher hands on what a terminal has sent to all already.
            if stop and time.monotonic() > stop[0] + _SAME_REQUEST:
                raise KeyboardInterrupt
            stop.append(time.monotonic())

        previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=self.recipe.steps, initial=self.step, unit="step", desc="train", disable=ranks.own() > 0)
        try:
            self._run(bar, stop, on_metrics)
        finally:
            if self.steps is not None:
                self.steps.close()
            self.steps = None
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.step < self.recipe.steps or self._unscored():
            raise KeyboardInterrupt
        with self.engine.whole():
            if ranks.own() == 0:
                self.generator.save_pretrained(self.folder / "generator", force=True)
        ranks.wait()

    def _run(self, bar: Any, stop: list[float], on_metrics: Callable[[dict[str, Any]], None] | None) -> None:
        """Train to the last step, or until there is something in `stop`."""
        if self.step == 0:
            self.save()  # so that a run that dies early can be started again
        self._evaluate(stop, on_metrics)  # of the start, or what was interrupted
        stopping = ranks.any_of(bool(stop))
        while self.step < self.recipe.steps and not stopping:
            start = time.perf_counter()
            with _explained(_less(self.recipe)):
                metrics = self.train_step()
            self._record({"step": self.step, **metrics, "seconds": time.perf_counter() - start}, on_metrics)
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", unrelated=f"{metrics['unrelated']:.3f}")
            stopping = ranks.any_of(bool(stop))
            unscored = self._unscored()
            if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps or stopping or unscored:
                self.save()  # before scores are made, which takes long
            if unscored and not stopping:
                self._evaluate(stop, on_metrics)
                stopping = ranks.any_of(bool(stop))

    def _unscored(self) -> list[str]:
        """The sets that answers are to be scored on behind this step, and were not yet."""
        if self.step % self.recipe.evaluation.every and self.step != self.recipe.steps:
            return []
        return self.log.unscored(self.step, self.evaluation)

    def _evaluate(self, stop: list[float], on_metrics: Callable[[dict[str, Any]], None] | None) -> None:
        """Score what is unscored, set by set, until there is something in `stop`."""
        conditions = ("patch", "swapped", *(("beside",) if self.recipe.beside else ()))
        for name in self._unscored():
            if ranks.any_of(bool(stop)):
                return
            items = self.evaluation[name]
            with _explained(_SHORTER), stored(self.student.blocks):
                scores = score_controls(self.generator, items, conditions)
            self._record({"step": self.step, "evaluation": name, **scores}, on_metrics)
            if ranks.own() == 0:
                tqdm.write(
                    f"step {self.step} {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()), sys.stderr
                )

    def _record(self, record: dict[str, Any], on_metrics: Callable[[dict[str, Any]], None] | None) -> None:
        self.log.write(record)
        if on_metrics:
            on_metrics(record)

    def summary(self) -> dict[str, Any]:
        """The run in short: its steps, the losses of the last one and the last scores of every evaluation set."""
        return {"generator": str(self.folder / "generator"), "steps": self.step, **self.log.summary()}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Replace the folder's checkpoint."""
        position = {
            "step": self.step,
            "drawn": self.drawing.position.mix,
            "unrelated": self.drawing.position.unrelated,
            "layout": self.engine.layout,
            **self.own,
        }

        def write(folder: Path) -> None:
            self.engine.save(folder)
            with self.engine.whole():
                if ranks.own() == 0:
                    Checkpoint(self.generator.state_dict(), position).write(folder)

        checkpoint.replace(self.folder, write)

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, if it has one. Raises InputError when it is of another recipe."""
        found = checkpoint.find(self.folder)
        if found is None:
            self.log.forget_after(-1)
            return False
        loaded = checkpoint.load(found)
        position = loaded.position
        check_own(self.folder, position, self.own, self.generator)
        with self.engine.whole():
            loaded.restore(self.generator)
        self.engine.load(found)
        self.steps = None
        self.step, self.drawing.position = position["step"], Position(position["drawn"], position["unrelated"])
        self.log.forget_after(self.step)
        return True


def _less(recipe: Recipe) -> str:
    """What to do about a step that needs more memory than there is."""
    ways = ["lower documents and raise micro_batches to the same product"] if recipe.documents > 1 else []
    ways += [] if recipe.checkpointing else ["set checkpointing: true"]
    less = f"{' or '.join(ways)}, and go on from the last checkpoint, which is intact"
    if not ways:
        less = "start anew with shorter documents or fewer questions"
    return f"out of memory at documents: {recipe.documents}; {less}; `hyperlora plan` shows what fits"


@contextmanager
def _explained(less: str) -> Iterator[None]:
    """Raises OutOfMemory, which says what to lower, where memory runs out in the block, and TrainingDiverged where a
    factorisation meets a number that is not finite."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise TrainingDiverged(
            "a patch was not finite; lower learning_rate and go on from the last checkpoint, which is intact"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(less) from error


def start(recipe: Recipe, folder: Path, name: str, zero: dict[str, Any] | None = None, **base_options: Any) -> Trainer:
    """A trainer in `folder`, new or where its last checkpoint left it; `base_options` go to `load_base`, `zero` are
    settings of DeepSpeed.

    Raises:
        InputError: the folder holds something else, or another recipe's run, or the base is in float16.
    """
    leftovers = {run_log.NAME, checkpoint.PARTIAL, *WRITTEN}  # of a run that died before its first checkpoint
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    found = checkpoint.find(folder)
    if present - leftovers and found is None:
        raise InputError(f"{folder} is not empty and holds no training run; choose another -o")
    if not ranks.agree(checkpoint.read_position(found)["step"] if found else -1):
        raise InputError(f"processes find different checkpoints in {folder}; all machines must share this folder")
    torch.manual_seed(recipe.seed)
    base = load_base(recipe.base, **base_options)
    if base.model.dtype == torch.float16:
        raise InputError("training in float16 would lose small gradients (no loss is scaled); use bfloat16 or float32")
    if recipe.start_from:
        generator = Generator.from_pretrained(recipe.start_from, base, recipe.generator).requires_grad_(True)
        generator.name = name
    else:
        generator = Generator(base, recipe.generator, name)
    trainer = Trainer(recipe, generator, folder, zero)
    if not trainer.resume() and not recipe.start_from:
        generator.calibrate(calibration_texts(recipe), recipe.calibration.tokens)
    folder.mkdir(parents=True, exist_ok=True)  # last, so that bad input leaves no folder
    return trainer
