"""Several prompts with their replies in one sequence behind one shared prefix: no padding, and the prefix read once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperlora.session import Session


@dataclass(frozen=True)
class Packed:
    """Sequences for `Session.feed`: all tensors (rows, tokens) but `visible` (rows, tokens, tokens).

    Every part sees the prefix and itself, at the positions that it has alone behind the prefix. `wanted` are the tokens
    that predict a reply, part after part.
    """

    ids: Tensor
    places: Tensor
    positions: Tensor
    wanted: Tensor
    visible: Tensor

    def logits(self, session: Session) -> Tensor:
        """Logits (reply tokens, vocabulary) in a session of as many rows, row after row."""
        return session.feed(self.ids, self.places, self.positions, self.wanted, visible=self.visible)


def pack(prefix: list[int], parts: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Packed:
    """Lay out `parts`, each the prompt after the prefix and the reply, as token ids.

    Raises:
        ValueError: nothing stands before a reply.
    """
    ids, positions, owner = list(prefix), list(range(len(prefix))), [-1] * len(prefix)
    wanted = [False] * len(prefix)
    for number, (prompt, reply) in enumerate(parts):
        if not prompt:
            raise ValueError("a prompt has no token after the prefix")
        tokens = prompt + reply[:-1]  # nothing has to see the last token
        ids += tokens
        positions += range(len(prefix), len(prefix) + len(tokens))
        owner += [number] * len(tokens)
        wanted += [False] * (len(prompt) - 1) + [True] * len(reply)
    owners = torch.tensor(owner, device=device)
    visible = (owners[:, None] == owners[None, :]) | (owners[None, :] < 0)
    return Packed(
        ids=torch.tensor([ids], device=device),
        places=torch.arange(len(ids), device=device)[None],
        positions=torch.tensor([positions], device=device),
        wanted=torch.tensor([wanted], device=device),
        visible=visible[None],
    )


def pack_alike(sequences: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Packed:
    """Prompts with their replies, of which what all prompts begin with is read once.

    Raises:
        ValueError: an empty prompt.
    """
    prompts = [prompt for prompt, _ in sequences]
    shared = alike(prompts)
    return pack(prompts[0][:shared], [(prompt[shared:], reply) for prompt, reply in sequences], device)


def alike(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with, at most all but the last one of a prompt."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    return max(0, min(sum(1 for _ in same), min(map(len, prompts)) - 1))


def stacked(packs: Sequence[Packed]) -> Packed:
    """Sequences of one row each as one batch, padded on the right."""
    lacks = [max(packed.ids.shape[1] for packed in packs) - packed.ids.shape[1] for packed in packs]

    def rows(name: str, value: float = 0) -> Tensor:
        return torch.cat([pad(getattr(p, name), (0, lack), value=value) for p, lack in zip(packs, lacks, strict=True)])

    visible = torch.cat([pad(p.visible, (0, lack, 0, lack)) for p, lack in zip(packs, lacks, strict=True)])
    return Packed(rows("ids"), rows("places", -1), rows("positions"), rows("wanted", False), visible)
