"""Answers from memories: one scoring and one generation loop for every kind of memory and every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hyperlora.base_model import BaseModel
from hyperlora.groups import padded_groups
from hyperlora.memory import Memory
from hyperlora.prompt import document_ids, encode
from hyperlora.prompt_reader import PlainReader, Prompt, Reader, open_reader

Progress = Callable[[int], Any]
Choose = Callable[[Tensor, Sequence[int]], Tensor]  # logits (rows, vocabulary) and the rows' numbers: their tokens


class Runtime:
    """Scores and generates from memories, in batches.

    Args:
        batch_tokens: sequences run together up to this many padded tokens (memory, prompt and reply).
        chunk_tokens: a longer prompt is read piece by piece, which bounds the size of the attention mask.
    """

    def __init__(self, base: BaseModel, batch_tokens: int = 4096, chunk_tokens: int = 1024):
        self.base, self.batch_tokens, self.chunk_tokens = base, batch_tokens, chunk_tokens

    def question(self, memory: int, text: str, reply: str | None = None) -> Prompt:
        """The prompt of a question in the base's chat format, with the reply to score."""
        base = self.base
        ids = base.prompt.question_ids(base.tokenizer, text)
        return Prompt(memory, ids, base.prompt.answer_ids(base.tokenizer, reply) if reply is not None else [])

    def continuation(self, memory: int, text: str) -> Prompt:
        """Text that follows the context at once, to score."""
        return Prompt(memory, [], document_ids(self.base.tokenizer, text), gap=False)

    @torch.no_grad()
    def prefill(self, memories: Sequence[Memory]) -> list[Memory]:
        """The memories with text and soft prompts read already, for many questions: their keys and values instead.

        What a rule lays out stays as it is, because the rule wants to see it.
        """
        read = [m for m in memories if m.kv is None and (m.shared is None or m.shared.rule is None)]
        found: dict[int, Memory] = {}
        for group in padded_groups([self._slot(memory) for memory in read], self.batch_tokens):
            batch = [read[index] for index in group]
            reader = PlainReader(self.base, batch, [], self.chunk_tokens)
            with reader:
                found |= {id(memory): made for memory, made in zip(batch, reader.slots(), strict=True)}
        return [found.get(id(memory), memory) for memory in memories]

    def groups(self, memories: Sequence[Memory]) -> Iterator[list[int]]:
        """Numbers of the memories that may be held as keys and values at the same time."""
        return padded_groups([self._slot(memory) for memory in memories], self.batch_tokens)

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
            with self._open(memories, batch) as reader:
                targets = torch.tensor([token for p in batch for token in p.reply], device=self.base.device)
                what = read(torch.cat(reader.replies()), targets).cpu()
                found |= dict(zip(order, what.split([len(prompt.reply) for prompt in batch]), strict=True))
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
        min_p: float = 0.0,
        seeds: Sequence[int] | None = None,
        stop: bool = True,
        last: Callable[[int], bool] | None = None,
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """Token ids of the replies, without the one that ends them.

        Args:
            temperature: 0 for greedy decoding.
            min_p: tokens less likely than so many times the likeliest one are never drawn (Nguyen et al. 2024, arXiv
                2407.01082).
            seeds: one for each prompt, so that a sample does not depend on its batch.
            stop: end a reply where the model does; False to measure the speed of a fixed number of tokens.
            last: tells of a token whether a reply ends with it.
        """
        found: dict[int, list[int]] = {}
        for order, batch in self._batches(memories, prompts, [max_new_tokens] * len(prompts)):
            own = [index if seeds is None else seeds[index] for index in order]
            choose = _greedy if temperature == 0 else _sampler(temperature, min_p, own)
            ends = self.base.stop_ids if stop else []
            found |= dict(zip(order, self._decode(memories, batch, max_new_tokens, choose, ends, last), strict=True))
            if progress:
                progress(len(batch))
        return [found[index] for index in range(len(prompts))]

    def _decode(
        self,
        memories: Sequence[Memory],
        batch: list[Prompt],
        max_new_tokens: int,
        choose: Choose,
        stop_ids: list[int],
        last: Callable[[int], bool] | None,
    ) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in batch]
        going = list(range(len(batch)))
        with self._open(memories, batch) as reader:
            logits = reader.begin()
            for step in range(max_new_tokens):
                tokens = dict(zip(going, choose(logits, going).tolist(), strict=True))
                going = [row for row in going if tokens[row] not in stop_ids]
                for row in going:
                    out[row].append(tokens[row])
                if last is not None:
                    going = [row for row in going if not last(tokens[row])]
                if not going or step + 1 == max_new_tokens:
                    break
                logits = reader.go_on([tokens[row] if row in going else None for row in range(len(batch))])
        return out

    # -- batches ------------------------------------------------------------------------------------------------------

    def _batches(
        self, memories: Sequence[Memory], prompts: Sequence[Prompt], extra: list[int]
    ) -> Iterator[tuple[list[int], list[Prompt]]]:
        """Prompts of like length together, at least one at a time; their numbers and themselves."""
        size = [self._slot(memories[p.memory]) + len(p.ids) + more for p, more in zip(prompts, extra, strict=True)]
        for batch in padded_groups(size, self.batch_tokens):
            yield batch, [prompts[i] for i in batch]

    def _slot(self, memory: Memory) -> int:
        """Tokens that stand before the prompt."""
        if memory.kv is not None:
            return memory.kv.positions.numel()
        soft = 0 if memory.soft is None else len(memory.soft)
        return len(encode(self.base.tokenizer, self.base.prompt.prefix)) + len(memory.text) + soft

    def _open(self, memories: Sequence[Memory], batch: Sequence[Prompt]) -> Reader:
        return open_reader(self.base, [memories[prompt.memory] for prompt in batch], batch, self.chunk_tokens)


def _greedy(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits.argmax(-1)


def _sampler(temperature: float, min_p: float, seeds: list[int]) -> Choose:
    """Draws a token of each of the `rows` by the Gumbel-max trick, each row with random numbers of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
        noise = torch.stack([torch.rand(logits.shape[1], generator=generators[row]) for row in rows])
        gumbel = -(-noise.clamp(1e-9, 1 - 1e-7).log()).log()
        scaled = logits / temperature
        if min_p:
            scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
        return (scaled + gumbel.to(logits.device)).argmax(-1)

    return choose
