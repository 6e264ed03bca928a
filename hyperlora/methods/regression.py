"""A LoRA that makes the student's hidden states the teacher's, in closed form: two ridge regressions per layer.

The student reads all lessons in one forward pass. In every layer, what the inputs of the attention's output projection
say linearly of the difference to what the teacher's attention, which sees the document, puts out is fitted by ridge
regression and put into that projection as a LoRA; then the same for the MLP's output projection and what is left of the
difference to the teacher's hidden state behind the layer. The modules above read what has been put right so far. That
is the update of MEMIT (Meng et al. 2022, arXiv 2210.07229) at every token, in all layers and in the attention too, with
reduced-rank regression (Izenman 1975) for the low rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperlora.base_model import BaseModel
from hyperlora.methods.teaching import Lesson
from hyperlora.packing import pack, stacked
from hyperlora.prompt import encode
from hyperlora.session import Session
from hyperlora.structure import Site, decoder_layers, hidden_of, residual_gain

_PACKED = 8  # lessons to a row


@torch.no_grad()
def fit(
    base: BaseModel,
    lessons: Sequence[Lesson],
    attention: Sequence[Site],
    sites: Sequence[Site],
    rank: int,
    ridge: float,
    question_weight: float = 1.0,
    others: Sequence[Lesson] = (),
    other_weight: float = 1.0,
    share: float = 1.0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """A (1, rank, d_in) and B (1, d_out, rank) of every site, by its path.

    Args:
        lessons: with what the teacher's `attention` puts out and its hidden states behind the layers of all `sites`, in
            their order.
        attention, sites: outputs of the attention and of the MLP, one to a layer, in layer order.
        ridge: in units of the mean square of the module's inputs, summed over tokens.
        question_weight: of the squared error at a question's tokens before its last; those that predict the reply
            weigh 1.
        others, other_weight: more lessons, and the weight of the squared error at all of their tokens.
        share: of what is missing, how much each layer makes up; the last eighth of the layers makes up all of it.
    """
    prefix = encode(base.tokenizer, base.prompt.prefix)
    weighed = [(x, [question_weight] * (len(x.question) - 1) + [1.0] * len(x.reply)) for x in lessons]
    weighed += [(x, [other_weight] * (len(x.question) - 1 + len(x.reply))) for x in others]
    weighed.sort(key=lambda pair: -len(pair[1]))
    count = -(-len(weighed) // _PACKED)
    rows = [weighed[number::count] for number in range(count)]  # of like length
    lessons, weight = [x for row in rows for x, _ in row], [part for row in rows for _, part in row]
    fields, real = _rows(base, prefix, [[x for x, _ in row] for row in rows])
    gains = _gains(base, sites, prefix + lessons[0].question)
    taught = torch.cat([lesson.hidden for lesson in lessons], dim=1)  # (layers, tokens, d_model)
    attended = torch.cat([lesson.attention for lesson in lessons], dim=1)
    scale = torch.tensor([value**0.5 for part in weight for value in part], device=base.device)[:, None]
    inputs: dict[str, Tensor] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def fitted(x: Tensor, missing: Tensor, depth: float) -> tuple[Tensor, Tensor]:
        part = share if depth <= 7 / 8 else 1.0
        return regress(scale * x[real], part * scale * missing, rank, ridge)

    def keep(path: str, _: Any, args: tuple) -> None:
        inputs[path] = args[0].float()

    def attend(number: int, site: Site, _: Any, __: Any, output: Tensor) -> Tensor:
        x = inputs.pop(site.path)
        missing = attended[number] - output[real].float()
        a, b = fitted(x, missing, (number + 1) / len(attention))
        found[site.path] = (a[None], b[None])
        return output + (x @ a.mT @ b.mT).to(output.dtype)

    def correct(number: int, site: Site, _: Any, __: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        x, gain = inputs.pop(site.path), gains[site.path]
        missing = taught[number] - hidden[real].float()
        a, b = fitted(x, missing, (number + 1) / len(sites))
        found[site.path] = (a[None], (b / gain[:, None])[None])
        hidden = hidden + (x @ a.mT @ b.mT).to(hidden.dtype)  # exact where the gain is one
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = decoder_layers(base.model)[1]
    handles = [
        base.model.get_submodule(site.path).register_forward_pre_hook(partial(keep, site.path))
        for site in (*attention, *sites)
    ]
    for number, site in enumerate(attention):
        handles.append(base.model.get_submodule(site.path).register_forward_hook(partial(attend, number, site)))
    for number, site in enumerate(sites):
        handles.append(blocks[site.layer].register_forward_hook(partial(correct, number, site)))
    try:
        with Session(base, len(rows), cached=False) as session:
            session.feed(**fields)
    finally:
        for handle in handles:
            handle.remove()
    return found


def regress(x: Tensor, y: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank), of equal size: W = B A minimises |x W^T - y|^2 + c |W|^2, with c `ridge`
    times the mean diagonal of x^T x, and is then cut to the directions in which the fit x W^T is largest.

    x (tokens, d_in), y (tokens, d_out).
    """
    moment, weight = _solve(x, y, ridge)
    directions = torch.linalg.eigh(weight.mT @ moment @ weight).eigenvectors[:, -rank:]
    a = (weight @ directions).mT
    size = a.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    lack = rank - len(a)  # a rank beyond d_out adds nothing
    return pad(a / size[:, None], (0, 0, 0, lack)), pad(directions * size, (0, lack))


def _solve(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """x^T x and W^T (d_in, d_out) of `regress`; in double precision where a small ridge drowns in single."""
    moment = x.mT @ x
    strong = moment.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny)
    damped = moment + ridge * strong * torch.eye(len(moment), dtype=x.dtype, device=x.device)
    factor, failed = torch.linalg.cholesky_ex(damped, check_errors=x.dtype == torch.float64)
    if bool(failed):
        return moment, _solve(x.double(), y.double(), ridge)[1].to(x.dtype)
    return moment, torch.cholesky_solve(x.mT @ y, factor)


def _rows(base: BaseModel, prefix: list[int], rows: Sequence[Sequence[Lesson]]) -> tuple[dict[str, Tensor], Tensor]:
    """What `Session.feed` takes, the lessons of each row packed behind one prefix, padded on the right; and where the
    lessons' tokens are, (rows, tokens) bool."""
    packed = stacked([pack(prefix, [(lesson.question, lesson.reply) for lesson in row], base.device) for row in rows])
    fields = {
        "inputs": packed.ids,
        "places": packed.places,
        "positions": packed.positions,
        "visible": packed.visible,
        "wanted": torch.zeros_like(packed.wanted),
    }
    return fields, packed.places >= len(prefix)


def _gains(base: BaseModel, sites: Sequence[Site], ids: list[int]) -> dict[str, Tensor]:
    """What a change of each site's output is worth in the residual stream, per channel (d_out,), measured on a text."""
    found: dict[str, Tensor] = {}

    def measure(site: Site, block: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden = hidden_of(output)
        gain = residual_gain(block, base.model.get_submodule(site.path), args, kwargs, hidden)
        found[site.path] = gain.clamp_min(0.05 * float(gain.median()))

    blocks = decoder_layers(base.model)[1]
    handles = [blocks[site.layer].register_forward_hook(partial(measure, site), with_kwargs=True) for site in sites]
    try:
        base.model.base_model(input_ids=torch.tensor([ids], device=base.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
