"""How likely a language model finds given texts. Any base does, so that one model's replies can be read by another."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from tqdm import tqdm

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.groups import padded_groups
from hyperlora.objectives import Row, collate, label_logits
from hyperlora.prompt import document_ids
from hyperlora.structure import context_window


@torch.no_grad()
def text_nll(
    base: BaseModel, texts: Sequence[str], batch_tokens: int = 1024, progress: str | None = None
) -> list[tuple[float, int]]:
    """Negative log-likelihood (nats) and number of scored tokens of each text, in order.

    Each text stands behind the model's bos token; where it has none, the first token is given and not scored. Texts
    are read together up to `batch_tokens` padded tokens (at least one text). `progress` names a bar.

    Raises:
        InputError: a text is longer than the model can read.
    """
    bos = base.tokenizer.bos_token_id
    ids = [([] if bos is None else [bos]) + document_ids(base.tokenizer, text) for text in texts]
    limit = context_window(base.model)
    for number, row in enumerate(ids, 1):
        if len(row) > limit:
            raise InputError(f"text {number} has {len(row)} tokens, {base.name} reads {limit}; cut it into parts")
    scores = [(0.0, 0)] * len(ids)
    read = [index for index, row in enumerate(ids) if len(row) > 1]
    with tqdm(total=len(read), unit="text", desc=progress, disable=progress is None) as bar:
        for numbers in padded_groups([len(ids[index]) for index in read], batch_tokens):
            group = [read[number] for number in numbers]
            batch = collate([Row(index, ids[index], 1) for index in group], base.device)
            losses = F.cross_entropy(label_logits(base.model, batch), batch.targets, reduction="none")
            for index, part in zip(group, losses.split(batch.labelled.sum(1).tolist()), strict=True):
                scores[index] = (float(part.sum()), len(part))
            bar.update(len(group))
    return scores


def perplexity(scores: Sequence[tuple[float, int]]) -> float:
    """exp of the mean over all scored tokens of `text_nll`. Raises InputError when there are none."""
    nats, tokens = sum(score[0] for score in scores), sum(score[1] for score in scores)
    if not tokens:
        raise InputError("the texts have no tokens to score; give at least one that is not empty")
    return math.exp(nats / tokens)
