"""What a site shall write at which inputs, and the update that does it: ridge regression, then its rank reduced.

For inputs X (slots, d_in), values V (slots, d_out) and the second moment C of generic text, the update that minimises
|V - X W|^2 + ridge d_in tr(W^T C W) answers each input with its own value, disturbs the others little and generic text
hardly. `Slots` hold the slots of one chunk; `Equations` those of any number of chunks in constant memory, so that a
document read in chunks gets the very update of the same slots taken together, in which no chunk disturbs another.

At a small rank (reduced-rank regression, Izenman 1975, doi 10.1016/0047-259X(75)90042-1) what must be kept is what the
update writes at the slots' own inputs, not what it would do to generic ones. They count by the size of their values, so
that weak slots of a long text do not push out a few strong ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from hyperlora.statistics import SecondMoment


class Equations(NamedTuple):
    """Normal equations of slots, in double precision; they add up over chunks.

    Attributes:
        gram: X^T X (documents, d_in, d_in).
        cross: X^T V (documents, d_in, d_out).
        seen_gram: of `Slots.seen`, (documents, d_in, d_in).
        ridge: ().
    """

    gram: Tensor
    cross: Tensor
    seen_gram: Tensor
    ridge: Tensor

    @property
    def equations(self) -> "Equations":
        return self

    def update(self, moment: SecondMoment) -> "Update":
        system = self.gram + self.ridge.double() * self.gram.shape[-1] * moment.dense().double()
        w = torch.cholesky_solve(self.cross, torch.linalg.cholesky(system)).to(moment.diagonal.dtype)
        a = rearrange(w, "documents d_in d_out -> documents d_out d_in")
        b = torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand(len(a), -1, -1)
        return Update(a, b, a @ self.seen().mT)

    def seen(self) -> Tensor:
        """(documents, d_in, d_in), with the products of `Slots.seen`."""
        size = self.seen_gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[:, None, None]
        floor = 1e-9 * size * torch.eye(self.seen_gram.shape[-1], dtype=size.dtype, device=size.device)
        return torch.linalg.cholesky(self.seen_gram + floor).mT.float()


class Slots(NamedTuple):
    """Slots of a batch of chunks; padding is zero.

    Attributes:
        x: inputs (documents, slots, d_in).
        values: what to write there (documents, slots, d_out).
        ridge: of the regression, in units of E[x^T C^-1 x] = d_in, ().
    """

    x: Tensor
    values: Tensor
    ridge: Tensor

    @property
    def equations(self) -> Equations:
        x, values, seen = (t.double() for t in (self.x, self.values, self.seen()))
        return Equations(x.mT @ x, x.mT @ values, seen.mT @ seen, self.ridge)

    def update(self, moment: SecondMoment) -> "Update":
        """One rank to a slot."""
        a = moment.solve(self.x)
        columns = compete(self.x, a, self.values, self.ridge)
        # By the equations that the columns solve: (G + ridge d_in) columns = values, and the update answers G columns.
        own = (self.values - self.ridge * self.x.shape[-1] * columns) * self._size()
        return Update(a, rearrange(columns, "documents slots d_out -> documents d_out slots"), own.detach().mT)

    def seen(self) -> Tensor:
        """The inputs, as large as what is written there (documents, slots, d_in)."""
        return self.x.detach() * self._size()

    def _size(self) -> Tensor:
        return self.values.detach().norm(dim=-1, keepdim=True)


class Update(NamedTuple):
    """A (documents, rows, d_in) and B (documents, d_out, rows) of a group, and `own`, what they write at the group's
    own `seen` inputs (documents, d_out, slots)."""

    a: Tensor
    b: Tensor
    own: Tensor


def compete(x: Tensor, toward: Tensor, values: Tensor, ridge: Tensor) -> Tensor:
    """(x C^-1 x^T + ridge * d_in)^-1 values, for x and toward = x C^-1 (documents, tokens, d_in), zero in padded rows,
    and values (documents, tokens, d_out): with rows of A `toward` and this as columns of B, B A = values^T K."""
    gram = toward @ x.mT  # (documents, tokens, tokens)
    gram = gram + ridge * x.shape[-1] * torch.eye(x.shape[1], device=x.device)
    return torch.cholesky_solve(values, torch.linalg.cholesky(gram))


def added(some: Sequence[Slots | Equations], more: Sequence[Slots | Equations]) -> tuple[Equations, ...]:
    """Groups of slots of several chunks of the same document."""
    pairs = ((one.equations, other.equations) for one, other in zip(some, more, strict=True))
    return tuple(Equations(a.gram + b.gram, a.cross + b.cross, a.seen_gram + b.seen_gram, a.ridge) for a, b in pairs)


def solved(groups: Sequence[Slots | Equations], moment: SecondMoment) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the updates of groups of slots that do not compete with each other: A, B and what they write where it
    counts, `outputs` of the rank cap."""
    updates = [group.update(moment) for group in groups]
    a, b = torch.cat([one.a for one in updates], dim=1), torch.cat([one.b for one in updates], dim=2)
    with torch.no_grad():
        outputs = torch.cat(
            [_written(updates, own, group.seen()) for own, group in zip(updates, groups, strict=True)], dim=2
        )
    return a, b, outputs


def _written(updates: Sequence[Update], own: Update, seen: Tensor) -> Tensor:
    """What all updates together write at the inputs of one of them, `own` (documents, d_out, slots)."""
    others = (one for one in updates if one is not own)
    return own.own + sum(one.b @ (one.a @ seen.mT) for one in others)
