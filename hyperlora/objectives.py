"""Losses of a patched student: cross-entropy on replies and text, KL to the bare model on unrelated text."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Row:
    """One sequence for the student: the patch of `document` is on, tokens from `start` are labels."""

    document: int
    ids: list[int]
    start: int


@dataclass
class Batch:
    """Padded rows. ids, labelled: (rows, tokens), `labelled` at positions that predict a label; targets: (labels,),
    the labels in row order; documents: (rows,)."""

    ids: Tensor
    labelled: Tensor
    targets: Tensor
    documents: Tensor


def collate(rows: list[Row], device: torch.device) -> Batch:
    """Pad on the right; under causal attention no mask is needed."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labelled = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labelled[index, row.start - 1 : len(row.ids) - 1] = True
    targets = ids[:, 1:][labelled[:, :-1]]
    documents = torch.tensor([row.document for row in rows])
    return Batch(ids.to(device), labelled.to(device), targets.to(device), documents.to(device))


@contextmanager
def only_positions(model: Any, positions: Tensor) -> Iterator[None]:
    """Inside the block the output layer sees only `positions` (rows, tokens): it is most of a small model's cost."""

    def select(_: nn.Module, args: tuple) -> tuple:
        return (args[0][positions],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def label_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (labels, vocabulary) in float32 at the positions that predict a label."""
    with only_positions(model, batch.labelled):
        return model(input_ids=batch.ids, use_cache=False).logits.float()


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """Sum over labels of the negative log-likelihood, nats."""
    return F.cross_entropy(label_logits(model, batch), batch.targets, reduction="sum")


def kl_from_bare(model: Any, batch: Batch, bare: Tensor) -> Tensor:
    """Sum over positions of KL(bare || patched), nats; `bare` are the bare model's logits at the same positions."""
    patched = F.log_softmax(label_logits(model, batch), dim=-1)
    return F.kl_div(patched, F.log_softmax(bare, dim=-1), reduction="sum", log_target=True)


def top_k_kl(logits: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Sum over positions of KL(teacher || student), nats, from the teacher's likeliest tokens.

    What the teacher leaves to all other tokens is compared as one outcome, so that the divergence is zero only where
    the student gives the same total to them.

    Args:
        logits: of the student (positions, vocabulary).
        ids, log_probs: of the teacher (positions, k).
    """
    student = F.log_softmax(logits, dim=-1).gather(1, ids)
    rest = 1 - log_probs.exp().sum(-1)
    likely = (log_probs.exp() * (log_probs - student)).sum()
    small = 1e-6
    student_rest = (1 - student.exp().sum(-1)).clamp_min(small)
    return likely + (rest.clamp_min(small) * (rest.clamp_min(small).log() - student_rest.log())).sum()
