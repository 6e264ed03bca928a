"""One small method of every kind that inserts tokens or restricts sight, as a file in `methods/` would have it."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from hyperlora.base_model import BaseModel
from hyperlora.layout import Layout, Stream, Tokens, run_masked
from hyperlora.memory import KV, Memory
from hyperlora.methods import Document, Method
from hyperlora.prompt import document_ids, encode
from hyperlora.session import Session

from . import layouts
from .test_layout import shared_state


class SmallMethod(Method):
    """What they share: their trained state, made at random."""

    def __init__(self, base: BaseModel, seed: int = 0):
        super().__init__(base, None, seed)
        self.shared = shared_state(base)
        self.new = base.model.get_input_embeddings().num_embeddings  # id of the first new token

    def texts(self, documents: Sequence[Document]) -> list[tuple[int, ...]]:
        return [tuple(document_ids(self.base.tokenizer, document.text)) for document in documents]


class LaidOut(SmallMethod):
    """A method of which a layout says what it should compute."""

    @abstractmethod
    def expected(self, tokens: Tokens) -> Layout:
        """The layout of prefix, context, prompt and reply."""


class Stored(LaidOut):
    """Keys and values of what the layout keeps of the document."""

    @torch.no_grad()
    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        prefix, texts = encode(self.base.tokenizer, self.base.prompt.prefix), self.texts(documents)
        slots = [range(len(prefix), len(prefix) + len(text)) for text in texts]
        made = [
            self.expected(Tokens([*prefix, *text, 0], slot, slot.stop)) for text, slot in zip(texts, slots, strict=True)
        ]
        with Session(self.base, len(made), shared=self.shared) as session:
            logits = Stream(session, len(made)).advance(made, [len(layout.ids) - 1 for layout in made])
            held = torch.tensor([[bool(p >= 0) for p in row] for row in session.places])
            session.keep(held & torch.stack([m.kept[p] for m, p in zip(made, session.places, strict=True)]))
            stored = [session.take(row, len(prefix), read[-1]) for row, read in enumerate(logits)]
        kv = [replace(one, next_position=int(m.positions[-1])) for one, m in zip(stored, made, strict=True)]
        return [Memory(kv=one, shared=self.shared) for one in kv]


class Gist(Stored):
    """Two gist tokens that alone have read the document."""

    name = "gist"

    def expected(self, tokens: Tokens) -> Layout:
        slot = tokens.context
        plain = layouts.gist(list(tokens.ids), slot.stop, [self.new, self.new + 1])
        plain.visible[:, : slot.start], plain.kept[: slot.start] = True, True
        predicts = torch.arange(1, len(plain.ids) + 1)
        predicts[-1] = -1
        return replace(plain, predicts=predicts)


class Compressed(Stored):
    """Two tokens behind each third of the document, which read it and those before them; text goes on as if they were
    not there (CCM concat)."""

    name = "compressed"

    def expected(self, tokens: Tokens) -> Layout:
        ids, slot = list(tokens.ids), tokens.context
        plain = layouts.compressed(thirds(ids, slot), [self.new, self.new + 1], ids[slot.stop :])
        plain.visible[:, : slot.start], plain.kept[: slot.start] = True, True
        predicts = plain.predicts.clone()
        behind = int((plain.predicts >= 0).nonzero()[0]) if bool((plain.predicts >= 0).any()) else len(predicts) - 1
        predicts[behind - 1] = behind  # the last COMP predicts what follows at once
        return replace(plain, predicts=predicts)


def thirds(ids: list[int], slot: range) -> list[list[int]]:
    """The context in three chunks, the first of them with the prefix."""
    bounds = [0, slot.start + len(slot) // 3, slot.start + 2 * len(slot) // 3, slot.stop]
    return [ids[start:end] for start, end in pairwise(bounds)]


class Merged(SmallMethod):
    """As `Compressed`, but two tokens remain, with the mean of the keys and values of those behind each third (CCM
    merge)."""

    name = "merged"

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory(kv=self.merged(list(text)), shared=self.shared) for text in self.texts(documents)]

    def merged(self, text: list[int]) -> KV:
        prefix = encode(self.base.tokenizer, self.base.prompt.prefix)
        before = self.read(prefix, None, [], len(prefix))
        memory = before
        comps = [self.new, self.new + 1]
        for number, chunk in enumerate(thirds(text, range(len(text)))):
            here = self.read(chunk, memory, comps, len(prefix))
            new = here.select(torch.arange(len(here.places)) >= len(here.places) - len(comps))
            if number == 0:
                memory = new
            else:
                memory = replace(
                    new,
                    keys=[
                        mean(held, own, number, len(prefix)) for held, own in zip(memory.keys, new.keys, strict=True)
                    ],
                    values=[
                        mean(v, own, number, len(prefix)) for v, own in zip(memory.values, new.values, strict=True)
                    ],
                )
        return memory

    def read(self, ids: list[int], memory: KV | None, comps: list[int], prefix: int) -> KV:
        """Keys and values of the memory, the tokens and the COMPs behind them; text goes on behind the tokens."""
        with Session(self.base, 1, shared=self.shared) as session:
            if memory is not None:
                session.load([memory])
            line = torch.tensor([[*ids, *comps]])
            numbers = torch.arange(line.shape[1])[None]
            start = session.next_position.clone()
            wanted = numbers == line.shape[1] - 1
            gate = (line >= self.new).float()
            logits = session.feed(line, session.next_place + numbers, start + numbers, wanted, gate=gate)
            kv = session.take(0, prefix, logits[-1])
        return replace(kv, next_position=int(start) + len(ids))


def mean(held: Tensor, new: Tensor, count: int, prefix: int) -> Tensor:
    """Behind the prefix, the mean of `count` that are in `held` already and one more."""
    return torch.cat([held[:, :prefix], (count * held[:, prefix:] + new[:, prefix:]) / (count + 1)], dim=1)


class GatedTokens(LaidOut):
    """New tokens behind the document, at which alone an adapter acts."""

    name = "gated_tokens"

    def expected(self, tokens: Tokens) -> Layout:
        plain = Layout.plain(tokens.ids)
        return replace(plain, gate=(plain.ids >= self.new).float())

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory(text=(*text, self.new, self.new + 1), shared=self.shared) for text in self.texts(documents)]


class Ruled(LaidOut):
    """The document under a rule."""

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        shared = replace(self.shared, rule=self.expected)
        return [Memory(text=text, shared=shared) for text in self.texts(documents)]


class DroppedSpan(Ruled):
    """The middle of the document stands between two sentinels, and only they see it."""

    name = "dropped_span"

    def expected(self, tokens: Tokens) -> Layout:
        slot = tokens.context
        third = len(slot) // 3
        return layouts.sentinel(list(tokens.ids), slot.start + third, slot.stop - third, self.new, self.new + 1)


class Window(Ruled):
    """Every token sees the twelve before it."""

    name = "window"

    def expected(self, tokens: Tokens) -> Layout:
        return layouts.local(list(tokens.ids), 12)


class Compressing(Ruled):
    """A token is inserted after every five and replaces them, also while decoding."""

    name = "compressing"

    def expected(self, tokens: Tokens) -> Layout:
        return layouts.placed(list(tokens.ids), set(range(4, len(tokens.ids), 5)), self.new + 2)


class Placing(Ruled):
    """A token is inserted where a classifier of the hidden state fires, in the reply alone, and replaces what was
    written since the one before. The prompt stays."""

    name = "placing"

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        shared = replace(self.shared, rule=self.rule, by_state=True)
        return [Memory(text=text, shared=shared) for text in self.texts(documents)]

    def fires(self, states: Tensor) -> Tensor:
        """(tokens,) bool of their hidden states."""
        return states.cpu() @ torch.randn(states.shape[1], generator=torch.Generator().manual_seed(7)) > 0

    def rule(self, tokens: Tokens) -> Layout:
        after: set[int] = set()
        for index in range(tokens.reply, len(tokens.ids) - 1):
            place = index + len(after)
            if place < len(tokens.states) and bool(self.fires(tokens.states[place][None])):
                after.add(index)
        return layouts.placed(list(tokens.ids), after, self.new + 2, tokens.reply)

    @torch.no_grad()
    def expected(self, tokens: Tokens) -> Layout:
        """Token by token, each time a masked pass over everything."""
        ids, after = list(tokens.ids), set[int]()
        for index in range(tokens.reply, len(ids) - 1):
            known = layouts.placed(ids[: index + 2], after, self.new + 2, tokens.reply)
            with Session(self.base, 1, shared=self.shared) as session:
                run_masked(session, [known])
                if bool(self.fires(session.hidden[:, index + len(after)])):
                    after.add(index)
        return layouts.placed(ids, after, self.new + 2, tokens.reply)


class Relaying(Placing):
    """As `Placing`, but the inserted token predicts what comes next, in the place of the one before it."""

    name = "relaying"

    def rule(self, tokens: Tokens) -> Layout:
        return self.relayed(super().rule(tokens))

    def expected(self, tokens: Tokens) -> Layout:
        return self.relayed(super().expected(tokens))

    def relayed(self, layout: Layout) -> Layout:
        places = (layout.ids[:-1] == self.new + 2).nonzero().flatten()
        predicts = layout.predicts.clone()
        predicts[places], predicts[places - 1] = predicts[places - 1], -1
        return replace(layout, predicts=predicts)


SMALL: dict[str, Callable[[BaseModel], SmallMethod]] = {
    method.name: method
    for method in (Gist, Compressed, Merged, GatedTokens, DroppedSpan, Window, Compressing, Placing, Relaying)
}
