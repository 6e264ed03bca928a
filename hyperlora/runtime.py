"""Answers from memories: one scoring and one generation loop for every kind of memory and every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.inject import stack_patches
from hyperlora.memory import Memory
from hyperlora.patch import check_base
from hyperlora.prompt import GAP, document_ids, encode
from hyperlora.session import Session

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Prompt:
    """What comes after the context slot: token ids, answered from the memory of number `memory`; `reply` are the ids to
    score, none when a reply is to be generated. `gap`: a blank line parts it from the context."""

    memory: int
    ids: list[int]
    reply: list[int]
    gap: bool = True


class Runtime:
    """Scores and generates from memories, in batches.

    Args:
        batch_tokens: sequences run together up to this many padded tokens (memory, prompt and reply).
        chunk_tokens: a longer prompt is read piece by piece, which bounds the size of the attention mask.
    """

    def __init__(self, base: BaseModel, batch_tokens: int = 4096, chunk_tokens: int = 1024):
        self.base, self.batch_tokens, self.chunk_tokens = base, batch_tokens, chunk_tokens
        self._prefix = encode(base.tokenizer, base.prompt.prefix)
        self._gap = encode(base.tokenizer, GAP)

    def question(self, memory: int, text: str, reply: str | None = None) -> Prompt:
        """The prompt of a question in the base's chat format, with the reply to score."""
        base = self.base
        ids = base.prompt.question_ids(base.tokenizer, text)
        return Prompt(memory, ids, base.prompt.answer_ids(base.tokenizer, reply) if reply is not None else [])

    def continuation(self, memory: int, text: str) -> Prompt:
        """Text that follows the context at once, to score."""
        return Prompt(memory, [], document_ids(self.base.tokenizer, text), gap=False)

    @torch.no_grad()
    def scored(
        self,
        memories: Sequence[Memory],
        prompts: Sequence[Prompt],
        read: Callable[[Tensor, Tensor], Tensor],
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """What `read` makes of the logits (tokens, vocabulary) and ids (tokens,) of the replies of a batch, one row for
        each token; split by prompt, on the CPU."""
        found: dict[int, Tensor] = {}
        for order, batch in self._batches(memories, prompts, [len(prompt.reply) for prompt in prompts]):
            with self._open(memories, batch, replies=True) as (_, logits, counts):
                targets = torch.tensor([token for p in batch for token in p.reply], device=logits.device)
                found |= dict(zip(order, read(logits, targets).cpu().split(counts), strict=True))
            if progress:
                progress(len(batch))
        return [found[index] for index in range(len(prompts))]

    def log_likelihood(
        self, memories: Sequence[Memory], prompts: Sequence[Prompt], progress: Progress | None = None
    ) -> list[Tensor]:
        """Log-probabilities (reply tokens,) of every prompt's reply, nats, float32."""
        return self.scored(memories, prompts, lambda x, y: -F.cross_entropy(x, y, reduction="none"), progress)

    def generate(
        self,
        memories: Sequence[Memory],
        prompts: Sequence[Prompt],
        max_new_tokens: int = 32,
        progress: Progress | None = None,
    ) -> list[str]:
        """Greedy replies, without the token that ends them."""
        replies = self.generate_ids(memories, prompts, max_new_tokens, progress=progress)
        return [self.base.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in replies]

    def replies(
        self,
        memories: Sequence[Memory],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Greedy replies as they are scored: token ids, and the one that ends a reply where the model ended it."""
        found = self.generate_ids(memories, prompts, max_new_tokens, progress=progress)
        end = self.base.prompt.end_ids(self.base.tokenizer)[:1]
        return [ids + end if len(ids) < max_new_tokens else ids for ids in found]

    @torch.no_grad()
    def generate_ids(
        self,
        memories: Sequence[Memory],
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        stop: bool = True,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Token ids of the replies, without the one that ends them.

        Args:
            temperature: 0 for greedy decoding.
            seeds: one for each prompt, so that a sample does not depend on its batch.
            stop: end a reply where the model does; False to measure the speed of a fixed number of tokens.
        """
        found: dict[int, list[int]] = {}
        for order, batch in self._batches(memories, prompts, [max_new_tokens] * len(prompts)):
            own = [index if seeds is None else seeds[index] for index in order]
            choose = _greedy if temperature == 0 else _sampler(temperature, own)
            ends = self.base.stop_ids if stop else []
            found |= dict(zip(order, self._decode(memories, batch, max_new_tokens, choose, ends), strict=True))
            if progress:
                progress(len(batch))
        return [found[index] for index in range(len(prompts))]

    def _decode(
        self,
        memories: Sequence[Memory],
        batch: list[Prompt],
        max_new_tokens: int,
        choose: Callable[[Tensor], Tensor],
        stop_ids: list[int],
    ) -> list[list[int]]:
        stop = torch.tensor(stop_ids, dtype=torch.long, device=self.base.device)
        out: list[list[int]] = [[] for _ in batch]
        with self._open(memories, batch, replies=False) as (session, logits, _):
            going = torch.ones(len(batch), dtype=torch.bool, device=logits.device)
            place = session.places.amax(1)
            position = torch.where(session.places >= 0, session.positions, -1).amax(1)
            for step in range(max_new_tokens):
                token = choose(logits)
                going = going & ~torch.isin(token, stop)
                for row in going.nonzero().flatten().tolist():
                    out[row].append(int(token[row]))
                if not going.any() or step + 1 == max_new_tokens:
                    break
                place, position = place + 1, position + 1
                logits = logits.clone()
                logits[going] = session.feed(
                    token[:, None],
                    torch.where(going, place, -1)[:, None],
                    position[:, None],
                    going[:, None],
                    gate=_closed(session, token[:, None]),
                )
        return out

    # -- batches ------------------------------------------------------------------------------------------------------

    def _batches(
        self, memories: Sequence[Memory], prompts: Sequence[Prompt], extra: list[int]
    ) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Prompts of like length together, at least one at a time; their numbers and themselves."""
        size = [self._slot(memories[p.memory]) + len(p.ids) + more for p, more in zip(prompts, extra, strict=True)]
        batch: list[int] = []
        for index in sorted(range(len(prompts)), key=lambda index: (-size[index], index)):
            if batch and size[batch[0]] * (len(batch) + 1) > self.batch_tokens:
                yield batch, [prompts[i] for i in batch]
                batch = []
            batch.append(index)
        if batch:
            yield batch, [prompts[i] for i in batch]

    def _slot(self, memory: Memory) -> int:
        """Tokens that stand before the prompt."""
        if memory.kv is not None:
            return memory.kv.positions.numel() + len(self._gap)
        soft = 0 if memory.soft is None else len(memory.soft)
        return len(self._prefix) + len(memory.text) + soft + len(self._gap)

    def _open(self, memories: Sequence[Memory], batch: list[Prompt], replies: bool) -> _Opened:
        return _Opened(self, [memories[prompt.memory] for prompt in batch], batch, replies)


class _Opened:
    """Reads memories and prompts; gives the session, the logits at the scored tokens (or at each prompt's last) and how
    many there are of each prompt."""

    def __init__(self, runtime: Runtime, memories: list[Memory], batch: list[Prompt], replies: bool):
        self.runtime, self.memories, self.batch, self.replies = runtime, memories, batch, replies
        base = runtime.base
        shared = {id(memory.shared): memory.shared for memory in memories}
        if len(shared) > 1:
            raise InputError("memories of one call must share their trained state")
        limit = base.model.config.get_text_config(decoder=True).max_position_embeddings
        for memory in memories:
            if memory.patch is not None:
                check_base(memory.patch.provenance, base.fingerprint, base.name)
        distinct = list({id(memory): memory for memory in memories}.values())
        numbers = {id(memory): number for number, memory in enumerate(distinct)}
        factors = stack_patches([memory.patch for memory in distinct], base.device)
        self.session = Session(
            base,
            len(batch),
            factors=factors,
            patch_rows=torch.tensor([numbers[id(memory)] for memory in memories], device=base.device),
            shared=next(iter(shared.values())),
        )
        kv = [memory.kv for memory in memories if memory.kv is not None]
        if kv:
            if len(kv) < len(memories):
                raise InputError("memories with and without stored keys and values cannot share a call")
            self.session.load(kv)
        starts = [memory.kv.next_position if memory.kv else 0 for memory in memories]
        rows = [self._row(memory, prompt) for memory, prompt in zip(memories, batch, strict=True)]
        if (most := max(start + len(row) for start, row in zip(starts, rows, strict=True))) > limit:
            raise InputError(f"a prompt of {most} tokens is beyond the model's window of {limit}")
        if replies and any(len(prompt.reply) > len(row) for prompt, row in zip(batch, rows, strict=True)):
            raise InputError("nothing stands before the text to score: this base has no token that starts a text")
        self.rows, self.starts = rows, starts

    def _row(self, memory: Memory, prompt: Prompt) -> Tensor:
        """Input embeddings (tokens, d_model) of everything that is not stored."""
        runtime = self.runtime
        tail = prompt.ids + (prompt.reply[:-1] if self.replies else [])
        slot = bool(memory.text or memory.soft is not None or memory.kv is not None)
        before = [] if memory.kv is not None else runtime._prefix + list(memory.text)
        after = (runtime._gap if slot and prompt.gap else []) + tail
        device = runtime.base.device
        parts = [self.session.embed(torch.tensor(ids, dtype=torch.long, device=device)) for ids in (before, after)]
        if memory.soft is not None:
            parts.insert(1, memory.soft.to(parts[0]))
        return torch.cat(parts)

    def __enter__(self) -> tuple[Session, Tensor, list[int]]:
        self.session.__enter__()
        try:
            return self._read()
        except BaseException:
            self.session.__exit__(None, None, None)
            raise

    def __exit__(self, *error: object) -> None:
        self.session.__exit__(*error)

    def _read(self) -> tuple[Session, Tensor, list[int]]:
        width, device = max(map(len, self.rows)), self.runtime.base.device
        counts = [len(prompt.reply) if self.replies else 1 for prompt in self.batch]
        inputs = self.rows[0].new_zeros(len(self.rows), width, self.rows[0].shape[1])
        places = torch.full((len(self.rows), width), -1, dtype=torch.long, device=device)
        positions = torch.zeros_like(places)
        wanted = torch.zeros(places.shape, dtype=torch.bool, device=device)
        for row, (embedded, memory, start) in enumerate(zip(self.rows, self.memories, self.starts, strict=True)):
            n = len(embedded)  # on the right, so that all sequences end together
            inputs[row, width - n :] = embedded
            places[row, width - n :] = torch.arange(n, device=device) + (memory.kv.next_place if memory.kv else 0)
            positions[row, width - n :] = torch.arange(n, device=device) + start
            wanted[row, width - counts[row] :] = True
        parts = []
        for begin in range(0, width, self.runtime.chunk_tokens):
            piece = slice(begin, begin + self.runtime.chunk_tokens)
            gate = _closed(self.session, places[:, piece])
            parts.append(
                self.session.feed(inputs[:, piece], places[:, piece], positions[:, piece], wanted[:, piece], gate=gate)
            )
        if len(parts) == 1:
            return self.session, parts[0], counts
        # Pieces come one after the other; put the rows' logits together again.
        split = [
            part.split(wanted[:, begin : begin + self.runtime.chunk_tokens].sum(1).tolist())
            for begin, part in zip(range(0, width, self.runtime.chunk_tokens), parts, strict=True)
        ]
        return self.session, torch.cat([torch.cat(row) for row in zip(*split, strict=True)]), counts


def _greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _sampler(temperature: float, seeds: list[int]) -> Callable[[Tensor], Tensor]:
    """Draws a token of every row by the Gumbel-max trick, each row with random numbers of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Tensor) -> Tensor:
        noise = torch.stack([torch.rand(logits.shape[1], generator=generator) for generator in generators])
        gumbel = -(-noise.clamp(1e-9, 1 - 1e-7).log()).log()
        return (logits / temperature + gumbel.to(logits.device)).argmax(-1)

    return choose


def _closed(session: Session, like: Tensor) -> Tensor | None:
    """The gate of ordinary tokens: shut when the shared adapter acts at new tokens only."""
    return torch.zeros(like.shape, device=like.device) if session.shared and session.shared.gated else None
