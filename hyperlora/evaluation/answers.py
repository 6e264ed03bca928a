"""Greedy replies of the base model to batches of prompts, with or without patches."""

from collections.abc import Sequence
from itertools import takewhile

import torch
import transformers

from hyperlora.base_model import BaseModel
from hyperlora.evaluation.window import check_fits


def answer(base: BaseModel, question: str, document: str | None = None, max_new_tokens: int = 48) -> str:
    """The base's greedy reply to a question in its own prompt format; of the patched one inside `patched`.

    Args:
        document: stands in the prompt.

    Raises:
        InputError: the prompt and the reply are beyond the base's window.
    """
    asked = len(base.prompt.question_ids(base.tokenizer, question)) + max_new_tokens
    check_fits("the prompt", document or "", asked, base)
    return greedy(base, [base.prompt.prompt_ids(base.tokenizer, question, document)], max_new_tokens)[0]


@torch.no_grad()
def greedy(base: BaseModel, prompts: Sequence[list[int]], max_new_tokens: int = 32) -> list[str]:
    """Replies (text without the end token) to prompts of token ids; prompts are padded on the left.

    Penalties and the like that a base brings in its generation config are left aside.
    """
    width, stop = max(map(len, prompts)), base.stop_ids
    pad = base.tokenizer.pad_token_id if base.tokenizer.pad_token_id is not None else (*stop, 0)[0]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    brought, base.model.generation_config = base.model.generation_config, transformers.GenerationConfig()
    try:
        out = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop or None,
            pad_token_id=pad,
        )
    finally:
        base.model.generation_config = brought
    replies = (takewhile(lambda token: token not in stop, row[width:].tolist()) for row in out)
    return [base.tokenizer.decode(list(reply), skip_special_tokens=True).strip() for reply in replies]
