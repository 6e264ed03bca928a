"""Reads memories and prompts into a session: ordinary ones, and those that a rule lays out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.inject import stack_patches
from hyperlora.layout import Layout, Rule, Stream, Tokens
from hyperlora.memory import Memory
from hyperlora.patch import check_base
from hyperlora.prompt import GAP, encode
from hyperlora.session import Session
from hyperlora.structure import context_window

_LEAST = 64  # tokens that a stream reads at once


@dataclass(frozen=True)
class Prompt:
    """What comes after the context slot: token ids, answered from the memory of number `memory`; `reply` are the ids to
    score, none when a reply is to be generated. `gap`: a blank line parts it from the context."""

    memory: int
    ids: list[int]
    reply: list[int]
    gap: bool = True


class Reader(ABC):
    """A batch of memories, each with a prompt, in a session of their own; used as a context manager.

    Args:
        memories: one for each prompt; one object may come several times.
        chunk: longer sequences are read in pieces of so many tokens.

    Raises:
        InputError: memories that do not go together, or a prompt beyond the model's window.
        BaseMismatch: a patch of another base.
    """

    def __init__(self, base: BaseModel, memories: Sequence[Memory], prompts: Sequence[Prompt], chunk: int):
        self.base, self.memories, self.prompts, self.chunk = base, memories, prompts, chunk
        if len({id(memory.shared) for memory in memories}) > 1:
            raise InputError("memories of one call must share their trained state")
        self.prefix, self.gap = encode(base.tokenizer, base.prompt.prefix), encode(base.tokenizer, GAP)
        for memory in memories:
            if memory.patch is not None:
                check_base(memory.patch.provenance, base.fingerprint, base.name)
        distinct = list({id(memory): memory for memory in memories}.values())
        numbers = {id(memory): number for number, memory in enumerate(distinct)}
        self.session = Session(
            base,
            len(memories),
            factors=stack_patches([memory.patch for memory in distinct], base.device),
            patch_rows=torch.tensor([numbers[id(memory)] for memory in memories], device=base.device),
            shared=memories[0].shared,
        )

    def __enter__(self) -> Reader:
        self.session.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.session.__exit__(*error)

    @abstractmethod
    def replies(self) -> list[Tensor]:
        """Logits (reply tokens, vocabulary) of every prompt's reply."""

    @abstractmethod
    def begin(self) -> Tensor:
        """Read the prompts; logits (prompts, vocabulary) of the first token of their replies."""

    @abstractmethod
    def go_on(self, tokens: list[int | None]) -> Tensor:
        """Read a further token of every reply that has one; logits (those replies, vocabulary) of the next."""

    def _check(self, longest: int) -> None:
        limit = context_window(self.base.model)
        if longest > limit:
            raise InputError(f"a prompt of {longest} tokens is beyond the model's window of {limit}")


def open_reader(base: BaseModel, memories: Sequence[Memory], prompts: Sequence[Prompt], chunk: int) -> Reader:
    """The reader for these memories: the one for layouts where their shared state has a rule."""
    kind = LayoutReader if memories[0].shared is not None and memories[0].shared.rule is not None else PlainReader
    return kind(base, memories, prompts, chunk)


class PlainReader(Reader):
    """Text, soft prompts and stored keys and values, each followed by its prompt, in the ordinary causal order."""

    def __init__(self, base: BaseModel, memories: Sequence[Memory], prompts: Sequence[Prompt], chunk: int):
        super().__init__(base, memories, prompts, chunk)
        self.going = list(range(len(memories)))  # the prompts whose replies are read on
        stored = [memory.kv for memory in memories if memory.kv is not None]
        if stored and len(stored) < len(memories):
            raise InputError("memories with and without stored keys and values cannot share a call")
        if stored:
            self.session.load(stored)

    def slots(self) -> list[Memory]:
        """The memories with everything up to the end of the slot as keys and values."""
        pieces = [self._slot(memory) for memory in self.memories]
        logits = iter(self._feed(pieces, [min(1, len(inputs)) for inputs, _ in pieces]))
        return [
            replace(
                memory,
                text=(),
                soft=None,
                kv=self.session.take(row, len(self.prefix), read[-1].clone() if len(read) else None),
            )
            for row, (memory, read) in enumerate(zip(self.memories, logits, strict=True))
        ]

    def replies(self) -> list[Tensor]:
        rows, counts = [], []
        for memory, prompt in zip(self.memories, self.prompts, strict=True):
            rows.append(self._row(memory, prompt, prompt.reply[:-1]))
            counts.append(min(len(prompt.reply), len(rows[-1][0])))
        found = self._feed(rows, counts)
        for index, (memory, prompt, count) in enumerate(zip(self.memories, self.prompts, counts, strict=True)):
            if count < len(prompt.reply):  # the reply follows the slot at once: its first token was predicted there
                if memory.kv is None:
                    what = "nothing stands before the text to score: this base has no token that starts a text"
                    raise InputError(what)
                if memory.kv.following is None:
                    raise InputError("these stored keys and values do not say what follows them; text cannot be scored")
                found[index] = torch.cat([memory.kv.following[None].to(found[index]), found[index]])
        return found

    def begin(self) -> Tensor:
        rows = [self._row(memory, prompt, []) for memory, prompt in zip(self.memories, self.prompts, strict=True)]
        return torch.cat(self._feed(rows, [1] * len(rows)))

    def go_on(self, tokens: list[int | None]) -> Tensor:
        device, session = self.base.device, self.session
        rest = [number for number in self.going if tokens[number] is not None]
        if 2 * len(rest) <= len(self.going):  # not every time, because what is kept is copied
            session.only(torch.tensor([self.going.index(number) for number in rest], device=device))
            self.going = rest
        going = torch.tensor([tokens[number] is not None for number in self.going], device=device)[:, None]
        ids = torch.tensor([[tokens[number] or 0] for number in self.going], device=device)
        places = torch.where(going, session.next_place[:, None], -1)
        gate = self._gate(torch.zeros(ids.shape, device=device))
        return session.feed(ids, places, session.next_position[:, None], going, gate=gate)

    def _slot(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Input embeddings (tokens, d_model) of what stands before the prompt and is not stored; where the shared
        adapter acts (tokens,) if it is gated."""
        if memory.kv is not None:
            return self._embed([])
        before = self._embed([*self.prefix, *memory.text])
        if memory.soft is None:
            return before
        return torch.cat([before[0], memory.soft.to(before[0])]), torch.cat([before[1], torch.zeros(len(memory.soft))])

    def _row(self, memory: Memory, prompt: Prompt, reply: list[int]) -> tuple[Tensor, Tensor]:
        filled = bool(memory.text) or memory.soft is not None
        if memory.kv is not None:
            filled = memory.kv.next_place > memory.kv.prefix
        after = self._embed((self.gap if filled and prompt.gap else []) + prompt.ids + reply)
        before = self._slot(memory)
        return torch.cat([before[0], after[0]]), torch.cat([before[1], after[1]])

    def _embed(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        numbers = torch.tensor(ids, dtype=torch.long, device=self.base.device)
        new = numbers >= self.base.model.get_input_embeddings().num_embeddings
        return self.session.embed(numbers), new.float().cpu()

    def _gate(self, acts: Tensor) -> Tensor | None:
        return acts if self.session.shared is not None and self.session.shared.gated else None

    def _feed(self, rows: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int]) -> list[Tensor]:
        """Read rows of embeddings; logits of the last `counts` tokens of each."""
        session, device = self.session, self.base.device
        width = max(1, *(len(inputs) for inputs, _ in rows))
        inputs = rows[0][0].new_zeros(len(rows), width, rows[0][0].shape[1])
        places = torch.full((len(rows), width), -1, dtype=torch.long, device=device)
        positions = torch.zeros_like(places)
        wanted = torch.zeros(places.shape, dtype=torch.bool, device=device)
        acts = torch.zeros(places.shape)
        for row, (embedded, act) in enumerate(rows):
            n = len(embedded)  # on the right, so that all sequences end together
            line = torch.arange(n, device=device)
            inputs[row, width - n :], acts[row, width - n :] = embedded, act
            places[row, width - n :] = session.next_place[row] + line
            positions[row, width - n :] = session.next_position[row] + line
            wanted[row, width - counts[row] :] = True
        self._check(int(positions.max()) + 1)
        gate = self._gate(acts.to(device))
        parts: list[list[Tensor]] = [[] for _ in rows]
        for begin in range(0, width, self.chunk):
            piece = slice(begin, begin + self.chunk)
            logits = session.feed(
                inputs[:, piece],
                places[:, piece],
                positions[:, piece],
                wanted[:, piece],
                gate=None if gate is None else gate[:, piece],
            )
            for part, row_logits in zip(parts, logits.split(wanted[:, piece].sum(1).tolist()), strict=True):
                part.append(row_logits)
        return [torch.cat(part) for part in parts]


class LayoutReader(Reader):
    """Text that a rule lays out, read piece by piece with what is not needed freed.

    A rule by states lays out a reply token by token, for it needs the state of each to say what comes behind it.
    """

    def __init__(self, base: BaseModel, memories: Sequence[Memory], prompts: Sequence[Prompt], chunk: int):
        super().__init__(base, memories, prompts, chunk)
        assert memories[0].shared is not None and memories[0].shared.rule is not None
        self.rule: Rule = memories[0].shared.rule
        self.by_state = memories[0].shared.by_state
        if any(memory.kv is not None or memory.soft is not None for memory in memories):
            raise InputError("a rule lays out text; it cannot go with stored keys and values or a soft prompt")
        self.rows = [
            [*self.prefix, *memory.text, *(self.gap if memory.text and prompt.gap else []), *prompt.ids]
            for memory, prompt in zip(memories, prompts, strict=True)
        ]
        self.before = [len(row) for row in self.rows]
        self.stream = Stream(self.session, len(memories), _LEAST, chunk, self.by_state)

    def replies(self) -> list[Tensor]:
        asked = [prompt.reply for prompt in self.prompts]
        if not self.by_state:
            layouts = self._layouts(asked)
            return self.stream.advance(layouts, [len(layout.ids) for layout in layouts])
        found = [[logits] for logits in self.begin()]
        for number in range(1, max(map(len, asked))):
            tokens = [reply[number - 1] if number < len(reply) else None for reply in asked]
            going = [row for row, token in zip(found, tokens, strict=True) if token is not None]
            for row, logits in zip(going, self.go_on(tokens), strict=True):
                row.append(logits)
        return [torch.stack(row[: len(reply)]) for row, reply in zip(found, asked, strict=True)]

    def begin(self) -> Tensor:
        return self._advance(range(len(self.rows)))

    def go_on(self, tokens: list[int | None]) -> Tensor:
        for row, token in zip(self.rows, tokens, strict=True):
            row += [] if token is None else [token]
        return self._advance([index for index, token in enumerate(tokens) if token is not None])

    def _advance(self, rows: Sequence[int]) -> Tensor:
        """Read all that comes before the next token."""
        further = [[0]] * len(self.rows)
        layouts = self._layouts(further)
        found = self.stream.advance(layouts, [len(layout.ids) - 1 for layout in layouts])
        if self.by_state:  # the newest token's state is known now, and with it what comes behind
            layouts = self._layouts(further)
            behind = self.stream.advance(layouts, [len(layout.ids) - 1 for layout in layouts])
            found = [new if len(new) else old for old, new in zip(found, behind, strict=True)]
        return torch.cat([found[row] for row in rows])

    def _layouts(self, further: Sequence[list[int]]) -> list[Layout]:
        """Layouts of all that is known and what is to be predicted, of which alone logits are wanted."""
        layouts = []
        for number, (row, more, memory) in enumerate(zip(self.rows, further, self.memories, strict=True)):
            context = range(len(self.prefix), len(self.prefix) + len(memory.text))
            layout = self.rule(Tokens([*row, *more], context, self.before[number], self.stream.states(number)))
            predicting = (layout.predicts >= 0).nonzero().flatten()[-len(more) :] if more else torch.empty(0).long()
            predicts = torch.full_like(layout.predicts, -1)
            predicts[predicting] = layout.predicts[predicting]
            layouts.append(replace(layout, predicts=predicts))
            if layouts[-1].targets.tolist() != more:
                raise InputError("nothing stands before the text to score, or its layout does not predict all of it")
        self._check(max(int(layout.positions.max()) + 1 for layout in layouts))
        return layouts
