"""Small layouts of every kind that a reference method needs, for tests."""

import torch

from hyperlora.layout import Layout


def gist(ids: list[int], context: int, gists: list[int]) -> Layout:
    """Context, gist tokens, prompt: the prompt sees the gists and not the context (Mu et al. 2023)."""
    sequence = ids[:context] + gists + ids[context:]
    plain = Layout.plain(sequence, scored_from=context + len(gists) + 1)
    visible, kept = plain.visible.clone(), plain.kept.clone()
    after = context + len(gists)
    visible[after:, :context] = False
    kept[:context] = False
    gate = torch.zeros(len(sequence))
    gate[context:after] = 1
    return Layout(plain.ids, plain.positions, visible, plain.predicts, gate, kept)


def sentinel(ids: list[int], start: int, end: int, left: int, right: int) -> Layout:
    """x CL span CR y: CL sees itself, CR sees CL and the span, y sees CR but neither CL nor span (Ren et al. 2023).
    Sentinels repeat the position before them and are never predicted: the token before predicts the one after."""
    sequence = [*ids[:start], left, *ids[start:end], right, *ids[end:]]
    n, cl, cr = len(sequence), start, end + 1
    real = [i for i in range(n) if i not in (cl, cr)]
    positions = torch.zeros(n, dtype=torch.long)
    predicts = torch.full((n,), -1)
    for count, place in enumerate(real):
        positions[place] = count
        if count + 1 < len(real):
            predicts[place] = real[count + 1]
    positions[cl], positions[cr] = positions[cl - 1], positions[cr - 1]
    visible = torch.ones(n, n, dtype=torch.bool)
    visible[cl], visible[cr] = False, False
    visible[cr, cl:cr] = True
    visible[cl + 1 : cr, cl] = False
    visible[cr + 1 :, cl:cr] = False
    kept = torch.ones(n, dtype=torch.bool)
    kept[cl:cr] = False
    gate = torch.zeros(n)
    gate[[cl, cr]] = 1
    return Layout(torch.tensor(sequence), positions, visible, predicts, gate, kept)


def compressed(chunks: list[list[int]], comps: list[int], prompt: list[int], recursive: bool = True) -> Layout:
    """c1 COMPs c2 COMPs ... prompt: a chunk and its COMPs see earlier COMPs only when `recursive`, the prompt sees them
    all (CCM concat, Kim et al. 2024). COMPs take the positions after their chunk; real tokens count on as if they were
    not there, so that with several of them positions fall."""
    ids: list[int] = []
    segment: list[int] = []  # chunk number of every token
    positions: list[int] = []
    read = 0
    for number, chunk in enumerate([*chunks, prompt]):
        new = comps if number < len(chunks) else []
        ids += [*chunk, *new]
        positions += range(read, read + len(chunk) + len(new))
        segment += [number] * (len(chunk) + len(new))
        read += len(chunk)
    own = torch.tensor(segment)[:, None] == torch.tensor(segment)[None]
    last = torch.tensor(segment)[:, None] == len(chunks)
    is_comp = torch.isin(torch.tensor(ids), torch.tensor(comps))
    visible = own | (is_comp[None] & (last | torch.tensor(recursive)))
    n, start = len(ids), len(ids) - len(prompt)
    predicts = torch.full((n,), -1)
    predicts[start : n - 1] = torch.arange(start + 1, n)
    kept = is_comp | last.squeeze(1)
    return Layout(torch.tensor(ids), torch.tensor(positions), visible, predicts, is_comp.float(), kept)


def local(ids: list[int], window: int) -> Layout:
    """Every token sees the last `window` tokens."""
    plain = Layout.plain(ids)
    n = torch.arange(len(ids))
    visible = n[:, None] - n[None] < window
    return Layout(plain.ids, plain.positions, visible, plain.predicts, plain.gate, n >= len(ids) - window)


def scattered(ids: list[int], ratio: float, seed: int) -> Layout:
    """One random set of keys is hidden from all queries but themselves."""
    plain = Layout.plain(ids)
    shown = torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)) >= ratio
    visible = shown[None].expand(len(ids), -1).clone()
    return Layout(plain.ids, plain.positions, visible, plain.predicts, plain.gate, shown)


def placed(ids: list[int], after: set[int], comp: int, start: int = 0) -> Layout:
    """A COMP behind each of the tokens `after`, in whose place later tokens see it: in that of all since the one
    before, from `start` on. It takes the position after its chunk, as the next token does."""
    sequence, positions, segment, real = [], [], [], []
    number = 0
    for index, token in enumerate(ids):
        for new in [False, True][: 1 + (index in after and index + 1 < len(ids))]:
            sequence.append(comp if new else token)
            positions.append(index + new)
            segment.append(number if index >= start else -1)
            real.append(not new)
        number += index in after
    segments, comps = torch.tensor(segment), ~torch.tensor(real)
    own = segments[:, None] == segments[None]
    visible = own | comps[None] | (segments[None] < 0)
    predicts = torch.full((len(sequence),), -1)
    places = (~comps).nonzero().flatten()
    predicts[places[:-1]] = places[1:]
    kept = comps | (segments == segments[-1]) | (segments < 0)
    return Layout(torch.tensor(sequence), torch.tensor(positions), visible, predicts, comps.float(), kept)
