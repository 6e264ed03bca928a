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


def compressed(chunks: list[list[int]], comp: int, prompt: list[int], recursive: bool = True) -> Layout:
    """c1 COMP c2 COMP ... prompt: a chunk and its COMP see earlier COMPs only when `recursive`, the prompt sees them
    all (CCM concat, Kim et al. 2024). COMP takes the position after its chunk; real tokens count on
    as if it were not there."""
    ids: list[int] = []
    segment: list[int] = []  # chunk number of every token
    positions: list[int] = []
    is_comp: list[bool] = []
    read = 0
    for number, chunk in enumerate([*chunks, prompt]):
        ids += chunk
        positions += range(read, read + len(chunk))
        read += len(chunk)
        if number < len(chunks):
            ids.append(comp)
            positions.append(read)
        size = len(chunk) + (number < len(chunks))
        segment += [number] * size
        is_comp += [False] * len(chunk) + [True] * (size - len(chunk))
    own = torch.tensor(segment)[:, None] == torch.tensor(segment)[None]
    last = torch.tensor(segment)[:, None] == len(chunks)
    comps = torch.tensor(is_comp)
    visible = own | (comps[None] & (last | torch.tensor(recursive)))
    n, start = len(ids), len(ids) - len(prompt)
    predicts = torch.full((n,), -1)
    predicts[start : n - 1] = torch.arange(start + 1, n)
    return Layout(torch.tensor(ids), torch.tensor(positions), visible, predicts, comps.float(), comps | last.squeeze(1))


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


def compressing(ids: list[int], every: int, comp: int) -> Layout:
    """A COMP after every so many tokens, in the document and in what is decoded: later tokens see it in their place.
    It takes the position after its chunk, as the next token does."""
    sequence, positions, segment, real = [], [], [], []
    for index, token in enumerate(ids):
        for new in [False, True][: 1 + (index % every == every - 1 and index + 1 < len(ids))]:
            sequence.append(comp if new else token)
            positions.append(index + new)
            segment.append(index // every)
            real.append(not new)
    segments, comps = torch.tensor(segment), ~torch.tensor(real)
    visible = (segments[:, None] == segments[None]) | comps[None]
    predicts = torch.full((len(sequence),), -1)
    places = (~comps).nonzero().flatten()
    predicts[places[:-1]] = places[1:]
    kept = comps | (segments == segments[-1])
    return Layout(torch.tensor(sequence), torch.tensor(positions), visible, predicts, comps.float(), kept)
