"""Losses of a patched student: cross-entropy on replies and text, KL to a teacher that has the document in its prompt,
distance from the teacher's hidden states, and KL to the bare model on unrelated text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hyperlora.structure import hidden_of


@dataclass(frozen=True)
class Row:
    """One sequence for the student: the patch of `document` is on, tokens from `start` are labels.

    Attributes:
        likeliest: of a teacher, for every label its k likeliest tokens and their log-probabilities (labels, k), and the
            weight of the label (labels,).
        told: the sequence of the teacher, which has the document in its prompt and ends with the same labels.
    """

    document: int
    ids: list[int]
    start: int
    likeliest: tuple[Tensor, Tensor, Tensor] | None = None
    told: list[int] | None = None

    @property
    def labels(self) -> int:
        return len(self.ids) - self.start


@dataclass
class Batch:
    """Padded rows. ids, labelled: (rows, tokens), `labelled` at positions that predict a label; targets: (labels,),
    the labels in row order; documents: (rows,).

    Attributes:
        taught: (labels,) bool, at labels for which a teacher's opinion is known; `top_ids`, `top_log_probs`
            (taught labels, k) and `weight` (taught labels,) are that opinion.
    """

    ids: Tensor
    labelled: Tensor
    targets: Tensor
    documents: Tensor
    taught: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    weight: Tensor


def collate(rows: list[Row], device: torch.device) -> Batch:
    """Pad on the right; under causal attention no mask is needed."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labelled = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labelled[index, row.start - 1 : len(row.ids) - 1] = True
    told = [row.likeliest for row in rows if row.likeliest is not None]
    parts = zip(*told, strict=True) if told else ([torch.zeros(0, 1).long()], [torch.zeros(0, 1)], [torch.zeros(0)])
    top_ids, top_log_probs, weight = (torch.cat(list(part)).to(device) for part in parts)
    taught = torch.tensor([row.likeliest is not None for row in rows for _ in range(row.labels)], dtype=torch.bool)
    return Batch(
        ids=ids.to(device),
        labelled=labelled.to(device),
        targets=ids[:, 1:][labelled[:, :-1]].to(device),
        documents=torch.tensor([row.document for row in rows], device=device),
        taught=taught.to(device),
        top_ids=top_ids,
        top_log_probs=top_log_probs,
        weight=weight,
    )


@contextmanager
def only_positions(model: Any, positions: Tensor) -> Iterator[list[Tensor]]:
    """Inside the block the output layer sees only `positions` (rows, tokens): it is most of a small model's cost. Gives
    a list that gets the final hidden states (rows, tokens, d_model) of every forward pass."""
    found: list[Tensor] = []

    def select(_: nn.Module, args: tuple) -> tuple:
        found.append(args[0])
        return (args[0][positions],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield found
    finally:
        handle.remove()


def label_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (labels, vocabulary) in float32 at the positions that predict a label."""
    with only_positions(model, batch.labelled):
        return model(input_ids=batch.ids, use_cache=False).logits.float()


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """Sum over labels of the negative log-likelihood, nats."""
    return F.cross_entropy(label_logits(model, batch), batch.targets, reduction="sum")


def reply_loss(logits: Tensor, batch: Batch, nll: float = 0.0) -> Tensor:
    """Sum over labels, nats: where a teacher's opinion is known the weighted KL divergence from it, and `nll` times the
    negative log-likelihood of its reply, weighed alike; elsewhere the negative log-likelihood. `logits` (labels,
    vocabulary)."""
    if not len(batch.weight):
        return F.cross_entropy(logits, batch.targets, reduction="sum")
    plain = F.cross_entropy(logits[~batch.taught], batch.targets[~batch.taught], reduction="sum")
    taught = top_k_kls(logits[batch.taught], batch.top_ids, batch.top_log_probs)
    if nll:
        taught = taught + nll * F.cross_entropy(logits[batch.taught], batch.targets[batch.taught], reduction="none")
    return plain + (batch.weight * taught).sum()


@contextmanager
def states(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside the block, what the decoder layers, or other modules in a list, put out at the last forward pass, (rows,
    tokens, d_model)."""
    found: dict[int, Tensor] = {}

    def keeper(layer: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found[layer] = hidden_of(output)

        return keep

    handles = [blocks[layer].register_forward_hook(keeper(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def state_spread(found: Tensor) -> Tensor:
    """How much hidden states (layers, tokens, d_model) vary from token to token, by layer: the mean square of their
    distance from the mean, in which channels that are large everywhere do not count."""
    return (found - found.mean(1, keepdim=True)).square().sum(2).mean(1).clamp_min(1e-6)


def state_distance(student: Tensor, teacher: Tensor, spread: Tensor) -> Tensor:
    """Squared distance of hidden states (layers, tokens, d_model) in units of `spread` (layers,), see `state_spread`:
    the sum over tokens of the mean over layers, a scalar."""
    return ((student - teacher).square().sum((1, 2)) / spread).mean()


def kl_from_bare(model: Any, batch: Batch, bare: Tensor) -> Tensor:
    """Sum over positions of KL(bare || patched), nats; `bare` are the bare model's logits at the same positions."""
    patched = F.log_softmax(label_logits(model, batch), dim=-1)
    return F.kl_div(patched, F.log_softmax(bare, dim=-1), reduction="sum", log_target=True)


def top_k_kl(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Sum over positions of `top_k_kls`."""
    return top_k_kls(logits, ids, log_probs).sum()


def top_k_kls(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """KL(teacher || student) at each position, nats, from the teacher's likeliest tokens; (positions,).

    What the teacher leaves to all other tokens is compared as one outcome, so that the divergence is zero only where
    the student gives the same total to them.

    Args:
        logits: of the student (positions, vocabulary).
        ids, log_probs: of the teacher (positions, k).
    """
    student = F.log_softmax(logits, dim=-1).gather(1, ids)
    rest = 1 - log_probs.exp().sum(-1)
    likely = (log_probs.exp() * (log_probs - student)).sum(-1)
    small = 1e-6
    student_rest = (1 - student.exp().sum(-1)).clamp_min(small)
    return likely + rest.clamp_min(small) * (rest.clamp_min(small).log() - student_rest.log())
