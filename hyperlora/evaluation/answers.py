"""Greedy replies of the base model to batches of prompts, with or without patches."""

from collections.abc import Sequence

import torch

from hyperlora.base_model import BaseModel


@torch.no_grad()
def greedy(base: BaseModel, prompts: Sequence[list[int]], max_new_tokens: int = 32) -> list[str]:
    """Replies (text without the end token) to prompts of token ids; prompts are padded on the left."""
    width = max(map(len, prompts))
    pad = base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else base.stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    out = base.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=base.stop_ids,
        pad_token_id=pad,
    )
    return [_reply(base, row[width:].tolist()) for row in out]


def _reply(base: BaseModel, ids: list[int]) -> str:
    ends = [index for index, token in enumerate(ids) if token in base.stop_ids]
    return base.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True).strip()
