"""One small method of every kind that inserts tokens or restricts sight, as a file in `methods/` would have it."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hyperlora.base_model import BaseModel
from hyperlora.layout import Layout, Stream
from hyperlora.memory import Memory
from hyperlora.methods import Document, Method
from hyperlora.prompt import document_ids, encode
from hyperlora.session import Session

from . import layouts
from .test_layout import shared_state


class SmallMethod(Method):
    """What the five share: their trained state, made at random, and the layout that says what they should compute."""

    def __init__(self, base: BaseModel, seed: int = 0):
        super().__init__(base, None, seed)
        self.shared = shared_state(base)
        self.new = base.model.get_input_embeddings().num_embeddings  # id of the first new token

    @abstractmethod
    def expected(self, ids: Sequence[int], slot: range) -> Layout:
        """The layout of prefix, context, prompt and reply."""

    def texts(self, documents: Sequence[Document]) -> list[tuple[int, ...]]:
        return [tuple(document_ids(self.base.tokenizer, document.text)) for document in documents]


class Gist(SmallMethod):
    """Keys and values of two gist tokens that alone have read the document."""

    name = "gist"

    def expected(self, ids: Sequence[int], slot: range) -> Layout:
        plain = layouts.gist(list(ids), slot.stop, [self.new, self.new + 1])
        plain.visible[:, : slot.start], plain.kept[: slot.start] = True, True
        predicts = torch.arange(1, len(plain.ids) + 1)
        predicts[-1] = -1
        return replace(plain, predicts=predicts)

    @torch.no_grad()
    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        prefix, texts = encode(self.base.tokenizer, self.base.prompt.prefix), self.texts(documents)
        made = [self.expected([*prefix, *text, 0], range(len(prefix), len(prefix) + len(text))) for text in texts]
        with Session(self.base, len(made), shared=self.shared) as session:
            logits = Stream(session, len(made)).advance(made, [len(layout.ids) - 1 for layout in made])
            held = torch.tensor([[bool(p >= 0) for p in row] for row in session.places])
            session.keep(held & torch.stack([m.kept[p] for m, p in zip(made, session.places, strict=True)]))
            kv = [session.take(row, len(prefix), read[-1]) for row, read in enumerate(logits)]
        return [Memory(kv=one, shared=self.shared) for one in kv]


class GatedTokens(SmallMethod):
    """New tokens behind the document, at which alone an adapter acts."""

    name = "gated_tokens"

    def expected(self, ids: Sequence[int], slot: range) -> Layout:
        plain = Layout.plain(ids)
        return replace(plain, gate=(plain.ids >= self.new).float())

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        return [Memory(text=(*text, self.new, self.new + 1), shared=self.shared) for text in self.texts(documents)]


class Ruled(SmallMethod):
    """The document under a rule."""

    def compile(self, documents: Sequence[Document], budgets: Sequence[int] | None = None) -> list[Memory]:
        shared = replace(self.shared, rule=self.expected)
        return [Memory(text=text, shared=shared) for text in self.texts(documents)]


class DroppedSpan(Ruled):
    """The middle of the document stands between two sentinels, and only they see it."""

    name = "dropped_span"

    def expected(self, ids: Sequence[int], slot: range) -> Layout:
        third = len(slot) // 3
        return layouts.sentinel(list(ids), slot.start + third, slot.stop - third, self.new, self.new + 1)


class Window(Ruled):
    """Every token sees the twelve before it."""

    name = "window"

    def expected(self, ids: Sequence[int], slot: range) -> Layout:
        return layouts.local(list(ids), 12)


class Compressing(Ruled):
    """A token is inserted after every five and replaces them, also while decoding."""

    name = "compressing"

    def expected(self, ids: Sequence[int], slot: range) -> Layout:
        return layouts.compressing(list(ids), 5, self.new + 2)


SMALL: dict[str, Callable[[BaseModel], SmallMethod]] = {
    method.name: method for method in (Gist, GatedTokens, DroppedSpan, Window, Compressing)
}
