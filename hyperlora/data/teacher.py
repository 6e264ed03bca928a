"""What the base says with the document in its prompt, generated once and read by every training run.

For each question of a source: a reply, the likeliest tokens at each of its positions with the document in the prompt,
and how likely the reply is without the document. Files of a few documents each, so that work is shared out and goes on
after a stop.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hyperlora import ranks
from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item, Question
from hyperlora.errors import InputError
from hyperlora.evaluation.metrics import contains
from hyperlora.evaluation.window import check_fits
from hyperlora.files import sha256, write_text
from hyperlora.fingerprint import Fingerprint
from hyperlora.memory import Memory
from hyperlora.prompt import document_ids
from hyperlora.runtime import Prompt, Runtime

_SETTINGS, _PART_DOCUMENTS = "teacher.json", 16
_PHRASING = "{question} (The answer is: {answer}. Say it in one short sentence.)"


@dataclass(frozen=True)
class Taught:
    """One reply of the teacher, of n tokens.

    Attributes:
        reply: token ids, the one that ends it included where the model ended it.
        top_ids, top_log_probs: (n, k) the likeliest tokens with the document in the prompt, nats.
        gain: (n,) by how much the document raises the log-probability of each token of the reply.
    """

    reply: list[int]
    top_ids: Tensor
    top_log_probs: Tensor
    gain: Tensor


def key(document: str, question: str) -> str:
    return sha256(f"{document}\0{question}".encode())[:32]


class TeacherCorpus:
    """The replies in a folder, by document and question.

    Attributes:
        settings: how and on what documents they were made.
        top_k: likeliest tokens that are kept at each position.

    Raises:
        InputError: the folder holds none, damaged ones, or those of another base.
    """

    def __init__(self, folder: Path, base: BaseModel):
        self.settings = settings = _read_settings(folder)
        if not base.fingerprint.same(Fingerprint(**settings["fingerprint"])):
            raise InputError(f"the replies in {folder} are of {settings['base']}, not of {base.name}; make new ones")
        self.top_k = int(settings["top_k"])
        self._held: dict[str, Taught] = {}
        made = sorted(folder.glob("part-*.safetensors"))
        for path in made:
            self._held |= dict(_read(path))
        if len(made) < (files := settings.get("files", 1)):
            raise InputError(
                f"{folder} holds {len(made)} of {files} files of a teacher's replies; run hyperlora teach to its end"
            )

    def __len__(self) -> int:
        return len(self._held)

    def find(self, document: str, question: str) -> Taught | None:
        return self._held.get(key(document, question))


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / _SETTINGS).read_text())
        if not {"base", "fingerprint", "top_k"} <= settings.keys():
            raise ValueError("other settings")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} holds no teacher's replies; make them with hyperlora teach") from error
    return settings


def _read(path: Path) -> Iterator[tuple[str, Taught]]:
    try:
        with safe_open(path, framework="pt") as file:
            index = json.loads(file.metadata()["index"])
            reply, top_ids, top_log_probs, gain = (
                file.get_tensor(name) for name in ("reply", "top_ids", "top_log_probs", "gain")
            )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it and run hyperlora teach again") from error
    start = 0
    for name, count in index:
        rows = slice(start, start + count)
        yield name, Taught(reply[rows].tolist(), top_ids[rows].long(), top_log_probs[rows].float(), gain[rows].float())
        start += count


def teach(
    base: BaseModel,
    items: Sequence[Item],
    folder: Path,
    shard: tuple[int, int] = (1, 1),
    top_k: int = 16,
    max_new_tokens: int = 48,
    phrased: bool = True,
) -> int:
    """Write the teacher's replies to all questions of `items`; what is there already is not made again.

    Args:
        shard: (i, n), only every n-th file from the i-th on, i from 1.
        phrased: replies say the question's own answer in the model's words. Where the model does not say it, and with
            False: the greedy reply.

    Returns:
        how many files were made.

    Raises:
        InputError: no questions, or the folder holds replies made otherwise.
    """
    asked = [item for item in items if item.questions]
    if not asked:
        raise InputError(
            "the sources have no questions, or none on short documents; give others, or raise --max-tokens"
        )
    if top_k > (known := len(base.model.get_output_embeddings().weight)):
        raise InputError(f"--top-k {top_k}: {base.name} has only {known} tokens")
    for item in asked:
        prompts = [_hint(question) if phrased else question.text for question in item.questions]
        longest = max(len(base.prompt.question_ids(base.tokenizer, prompt)) for prompt in prompts)
        check_fits(f"teach, document {item.id}", item.text, longest + max_new_tokens, base)
    groups = [asked[start : start + _PART_DOCUMENTS] for start in range(0, len(asked), _PART_DOCUMENTS)]
    settings = {
        "base": base.name,
        "fingerprint": vars(base.fingerprint),
        "top_k": top_k,
        "max_new_tokens": max_new_tokens,
        "phrased": phrased,
        "documents": sha256(json.dumps([[item.text, *map(vars, item.questions)] for item in asked]).encode()),
        "files": len(groups),
    }
    if ranks.own() == 0:  # or one process would find the folder that another is just making
        _claim(folder, settings)
    ranks.wait()
    _claim(folder, settings)
    index, count = shard
    todo = {
        path: group
        for number, group in enumerate(groups)
        if number % count == index - 1 and not (path := folder / f"part-{number:06}.safetensors").exists()
    }
    runtime = Runtime(base)
    for path, group in tqdm(todo.items(), unit="file", desc="teach"):
        _write(path, _taught(runtime, group, top_k, max_new_tokens, phrased))
    return len(todo)


def _hint(question: Question) -> str:
    """The question, asking for its answer in the model's own words."""
    return _PHRASING.format(question=question.text, answer=question.reply)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / _SETTINGS
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    if _SETTINGS in names:
        try:
            found = _read_settings(folder)
        except InputError as error:
            raise InputError(f"{path} cannot be read; choose another -o, or remove it to make all anew") from error
        if changed := [name for name in settings if settings[name] != found.get(name)]:
            raise InputError(f"{folder} holds replies made with another {', '.join(changed)}; choose another -o")
        return
    # Another shard's process may be writing the settings just now, or was killed while it did.
    if any(not name.startswith(f".{_SETTINGS}-") for name in names):
        raise InputError(f"{folder} is not empty and holds no teacher's replies; choose another -o")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=1) + "\n")


def _taught(
    runtime: Runtime, items: Sequence[Item], top_k: int, max_new_tokens: int, phrased: bool
) -> dict[str, Taught]:
    base = runtime.base
    memories = runtime.prefill([Memory(text=tuple(document_ids(base.tokenizer, item.text))) for item in items])
    pairs = [(number, question) for number, item in enumerate(items) for question in item.questions]
    plain = [runtime.question(number, question.text) for number, question in pairs]
    replies = runtime.replies(memories, plain, max_new_tokens)
    if phrased:
        hinted = [runtime.question(number, _hint(question)) for number, question in pairs]
        said = runtime.replies(memories, hinted, max_new_tokens)
        right = [
            contains(base.tokenizer.decode(ids, skip_special_tokens=True), question.accepted) > 0
            for ids, (_, question) in zip(said, pairs, strict=True)
        ]
        replies = [told if ok else greedy for told, ok, greedy in zip(said, right, replies, strict=True)]
    prompts = [Prompt(p.memory, p.ids, reply) for p, reply in zip(plain, replies, strict=True)]

    def likeliest(logits: Tensor, targets: Tensor) -> Tensor:
        """Columns: the k ids, their log-probabilities, the log-probability of the reply's own token."""
        log_probs = F.log_softmax(logits, dim=-1)
        values, ids = log_probs.topk(top_k, dim=-1)
        # Ids below 2^24 are exact in float32.
        return torch.cat([ids.float(), values, log_probs.gather(1, targets[:, None])], dim=1)

    with_document = runtime.scored(memories, prompts, likeliest)
    bare = [Prompt(0, p.ids, p.reply) for p in prompts]
    without = runtime.log_likelihood([Memory()], bare)
    return {
        key(items[number].text, question.text): Taught(
            prompt.reply, found[:, :top_k].long(), found[:, top_k : 2 * top_k], found[:, -1] - alone
        )
        for (number, question), prompt, found, alone in zip(pairs, prompts, with_document, without, strict=True)
    }


def _write(path: Path, taught: dict[str, Taught]) -> None:
    """All at once: to a name beside it, then renamed."""
    tensors = {
        "reply": torch.tensor([token for one in taught.values() for token in one.reply], dtype=torch.int32),
        "top_ids": torch.cat([one.top_ids for one in taught.values()]).to(torch.int32),
        "top_log_probs": torch.cat([one.top_log_probs for one in taught.values()]).half(),
        "gain": torch.cat([one.gain for one in taught.values()]).half(),
    }
    index = [[name, len(one.reply)] for name, one in taught.items()]
    partial = path.with_name(f".{path.name}")
    try:
        save_file(tensors, partial, metadata={"index": json.dumps(index)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({error}); free some space and run the same command again") from error
