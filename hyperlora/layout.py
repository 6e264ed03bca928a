"""Sequences with inserted tokens and restricted sight, as data, and two ways to run them.

A layout says of every token its id, its absolute position, whom it sees, what it predicts, whether the shared adapter
acts there and whether its K/V survive the sequence. `run_masked` computes it in one forward pass, for training and
perplexity. `run_incremental` computes it piece by piece and frees K/V as soon as no later token sees them; a `Stream`
does so while the sequence grows, as when decoding. All give the same logits. Gist tokens, compressed context memory,
sentinel tokens, local and scattered attention are all layouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hyperlora.session import Session

FOREVER = 2**40


@dataclass(frozen=True)
class Tokens:
    """What a rule lays out.

    Attributes:
        ids: the last one may stand for a token that is not known yet.
        context: which of them are the context.
        reply: number of the first one of the reply.
        states: (read, d_model) final hidden states of what the layout has read already, by place; for rules by state.
    """

    ids: Sequence[int]
    context: range
    reply: int
    states: Tensor = field(default_factory=lambda: torch.empty(0, 0), repr=False)


# Lays out tokens. What comes before the last one must not depend on it: then a longer sequence has the layout of a
# shorter one as its start, and the last token's predictor is what decodes. Every token behind the context must be
# predicted. What a rule inserts behind a token may depend on the state of that token and of those before it.
Rule = Callable[[Tokens], "Layout"]


@dataclass(frozen=True)
class Layout:
    """One sequence of `n` tokens.

    Attributes:
        ids: (n,); ids from the vocabulary's end on are new tokens of the shared state.
        positions: (n,) absolute positions; they may repeat (sentinels) and fall (text that goes on behind compressed
            memory as if that were not there).
        visible: (n, n) bool, row sees column; ANDed with the causal order. A token always sees itself.
        predicts: (n,) place of the token that this token's output is scored on, -1 for none.
        gate: (n,) scale of the shared adapter.
        kept: (n,) bool, whose K/V survive the sequence.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    predicts: Tensor
    gate: Tensor
    kept: Tensor

    @staticmethod
    def plain(ids: Sequence[int], scored_from: int = 1) -> "Layout":
        """Ordinary causal text in which the tokens from place `scored_from` on are predicted."""
        n = len(ids)
        following = torch.arange(1, n + 1)
        return Layout(
            ids=torch.tensor(ids, dtype=torch.long),
            positions=torch.arange(n),
            visible=torch.ones(n, n, dtype=torch.bool),
            predicts=torch.where((following >= scored_from) & (following < n), following, -1),
            gate=torch.ones(n),
            kept=torch.ones(n, dtype=torch.bool),
        )

    def __post_init__(self) -> None:
        n = len(self.ids)
        shapes = {name: tuple(getattr(self, name).shape) for name in ("positions", "predicts", "gate", "kept")}
        if any(shape != (n,) for shape in shapes.values()) or self.visible.shape != (n, n):
            raise ValueError(f"a layout of {n} tokens has {shapes} and sight {tuple(self.visible.shape)}")
        if bool((self.positions < 0).any()):
            raise ValueError("positions of a layout may not be negative")
        wrong = (self.predicts >= 0) & (self.predicts <= torch.arange(n)) | (self.predicts >= n)
        if bool(wrong.any()):
            raise ValueError("a token of a layout predicts one that does not come after it")

    @property
    def targets(self) -> Tensor:
        """Ids (scored tokens,) that the predicting tokens are scored on, in their order."""
        return self.ids[self.predicts[self.predicts >= 0]]

    def seen_by(self, places: Tensor) -> Tensor:
        """(places, n) bool: `visible` within the causal order, every token seeing itself."""
        all_places, own = torch.arange(len(self.ids)), places[:, None]
        return (self.visible[places] & (all_places < own)) | (all_places == own)

    @property
    def freed_after(self) -> Tensor:
        """(n,) place of the last token that sees each token; FOREVER for those that are kept."""
        n = len(self.ids)
        from_the_end = self.seen_by(torch.arange(n).flip(0)).view(torch.uint8)
        return torch.where(self.kept, FOREVER, n - 1 - from_the_end.argmax(0)) if n else self.positions


def run_masked(session: Session, layouts: Sequence[Layout], side: Literal["left", "right"] = "right") -> list[Tensor]:
    """Logits (scored tokens, vocabulary) of every layout, in one forward pass of a fresh session."""
    device, width = session.base.device, max(len(layout.ids) for layout in layouts)

    def padded(name: str, fill: float | bool) -> Tensor:
        rows = []
        for layout in layouts:
            value = getattr(layout, name)
            before = width - len(value) if side == "left" else 0
            row = value.new_full((width,), fill)
            row[before : before + len(value)] = value
            rows.append(row)
        return torch.stack(rows).to(device)

    places = torch.full((len(layouts), width), -1, dtype=torch.long)
    visible = torch.zeros(len(layouts), width, width, dtype=torch.bool)
    for row, layout in enumerate(layouts):
        n = len(layout.ids)
        start = width - n if side == "left" else 0
        places[row, start : start + n] = torch.arange(n)
        visible[row, start : start + n, start : start + n] = layout.seen_by(torch.arange(n))
    wanted = padded("predicts", -1) >= 0
    logits = session.feed(
        padded("ids", 0),
        places.to(device),
        padded("positions", 0),
        wanted,
        visible=visible.to(device),
        gate=padded("gate", 0.0),
    )
    return list(logits.split(wanted.sum(1).tolist()))


class Stream:
    """Layouts that are run piece by piece and may grow: a piece ends where the K/V of some token can be freed.

    Args:
        session: fresh.
        least: tokens in a piece at least, where freeing at once would make pieces of single tokens.
        most: and at most, which bounds the size of the attention mask.
        stateful: keep the final hidden states of what is read.
    """

    def __init__(self, session: Session, rows: int, least: int = 1, most: int = 1024, stateful: bool = False):
        self.session, self.least, self.most, self.stateful = session, min(least, most), most, stateful
        self._read: list[list[int]] = [[] for _ in range(rows)]
        self._states: list[list[Tensor]] = [[] for _ in range(rows)]

    def states(self, row: int) -> Tensor:
        """Final hidden states (read, d_model), by place; none unless they are kept."""
        return torch.cat(self._states[row]) if self._states[row] else torch.empty(0, 0)

    def advance(self, layouts: Sequence[Layout], ends: Sequence[int]) -> list[Tensor]:
        """Read every layout up to its place `ends`; logits (scored tokens, vocabulary) of what is read now.

        Raises:
            ValueError: a layout has other tokens where it was read before.
        """
        for layout, read in zip(layouts, self._read, strict=True):
            if layout.ids[: len(read)].tolist() != read:
                raise ValueError("a layout changed what was read already: it must not depend on later tokens")
        freed = [layout.freed_after for layout in layouts]
        parts: list[list[Tensor]] = [[] for _ in layouts]
        while any(len(read) < end for read, end in zip(self._read, ends, strict=True)):
            pieces = [
                range(len(read), self._stop(last, len(read), end))
                for read, last, end in zip(self._read, freed, ends, strict=True)
            ]
            logits = self._feed(layouts, pieces)
            for part, piece_logits in zip(parts, logits, strict=True):
                part.append(piece_logits)
            for read, layout, piece in zip(self._read, layouts, pieces, strict=True):
                read += layout.ids[piece.start : piece.stop].tolist()
            held = self.session.places.cpu()
            kept = [
                last[row.clamp(min=0)] >= len(read) for last, row, read in zip(freed, held, self._read, strict=True)
            ]
            self.session.keep(torch.stack(kept).to(self.session.places.device))
        return [torch.cat(part) if part else torch.empty(0) for part in parts]

    def _stop(self, freed: Tensor, start: int, end: int) -> int:
        """Where the piece ends: behind the first token, `least` tokens on, that is the last to see another."""
        end = min(end, start + self.most)
        stops = freed[(freed + 1 >= start + self.least) & (freed + 1 < end)] + 1
        return int(stops.min()) if len(stops) else end

    def _feed(self, layouts: Sequence[Layout], pieces: Sequence[range]) -> list[Tensor]:
        session, device, width = self.session, self.session.base.device, max(map(len, pieces))
        shape = (len(layouts), width)
        ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        places, gate = torch.full(shape, -1, dtype=torch.long), torch.zeros(shape)
        wanted = torch.zeros(shape, dtype=torch.bool)
        held = session.places.cpu()
        visible = torch.zeros(*shape, session.kv_rows + width, dtype=torch.bool)
        for row, (layout, piece) in enumerate(zip(layouts, pieces, strict=True)):
            here, count = torch.tensor(piece, dtype=torch.long), len(piece)
            ids[row, :count], positions[row, :count] = layout.ids[here], layout.positions[here]
            places[row, :count], gate[row, :count] = here, layout.gate[here]
            wanted[row, :count] = layout.predicts[here] >= 0
            sight = layout.seen_by(here)
            visible[row, :count, : held.shape[1]] = sight[:, held[row].clamp(min=0)]
            visible[row, :count, held.shape[1] : held.shape[1] + count] = sight[:, here]
        logits = session.feed(
            ids.to(device),
            places.to(device),
            positions.to(device),
            wanted.to(device),
            visible=visible.to(device),
            gate=gate.to(device),
        )
        if self.stateful:
            for states, hidden, piece in zip(self._states, session.hidden, pieces, strict=True):
                states.append(hidden[: len(piece)].clone())
        return list(logits.split(wanted.sum(1).tolist()))


def run_incremental(session: Session, layouts: Sequence[Layout]) -> list[Tensor]:
    """The same logits as `run_masked`, computed piece by piece; what is not kept is freed in the end."""
    return Stream(session, len(layouts)).advance(layouts, [len(layout.ids) for layout in layouts])
