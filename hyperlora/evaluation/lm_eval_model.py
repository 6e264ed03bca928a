"""Patches as a model of lm-evaluation-harness.

`python -m hyperlora.evaluation.lm_eval_model ARGS` is the command `lm-eval ARGS` with one model more, `hyperlora`. The
file is imported on demand only, because it needs the extra `lm-eval`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import hyperlora
from hyperlora.base_model import load_base
from hyperlora.cli import fail, guarded
from hyperlora.cli.loading import base_options
from hyperlora.errors import InputError, nearest
from hyperlora.files import sha256
from hyperlora.memory import Memory
from hyperlora.methods import METHODS, Document
from hyperlora.runtime import Progress, Prompt, Runtime

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    missing = InputError('the model of lm-evaluation-harness needs an extra: pip install "hyperlora[lm-eval]"')
    if __name__ == "__main__":  # nobody else is there to make one line of it
        fail(str(missing), missing.code)
    raise missing from error

Answer = TypeVar("Answer")
UNIT = 32  # documents that are compiled and answered together
KEPT = 64  # memories that outlive a call, so that several tasks on the same documents share them
_LENGTHS = ("max_gen_toks", "max_new_tokens")
_GENERATION = (*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k")


@register_model("hyperlora")
class HyperloraLM(LM):
    """Answers requests from what a method made of their documents.

    The document of a request is a field of its row. It is cut out of the prompt where it stands last, because examples
    before the question may be about it too; what remains, trimmed, is the question in the base's chat format.

    Args:
        base: base model, as for `load_base`; None for the default one.
        generator: directory or hub id of the generator; None for the one that ships.
        method: any method's name, with its default settings. One that needs a budget of bytes gets what the generator's
            patch of the document takes.
        context_field: field of the rows that holds the document.
        batch_tokens: padded tokens that run together.
        device, dtype, trust_remote_code: as for `load_base`, by name; without CUDA it is the CPU. On the command line
            the device is the option `--device`.
        batch_size, max_batch_size: what the harness passes to every model; `batch_tokens` stands in their place.

    Raises:
        InputError: an unknown argument or method, or a generator that cannot be read.
        BaseMismatch: the generator is for another base.
    """

    def __init__(
        self,
        base: str | None = None,
        generator: str | None = None,
        method: str = "generator",
        context_field: str = "context",
        batch_tokens: int = 4096,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            known = ("base", "generator", "method", "context_field", "batch_tokens", "device", "dtype")
            raise InputError(f"unknown model argument {next(iter(unknown))!r}; {nearest(next(iter(unknown)), known)}")
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}; {nearest(method, METHODS)}")
        if not torch.cuda.is_available() and str(device).startswith("cuda"):
            device = None  # the harness asks for cuda:0 unless it is told otherwise
        loaded = load_base(base, **base_options(device, dtype, None, trust_remote_code))
        patches = METHODS["generator"]
        settings = patches.Settings(path=generator)  # type: ignore[call-arg]
        kind = METHODS[method]
        self.method = kind(loaded, settings if kind is patches else kind.Settings())
        self.payer = patches(loaded, settings) if kind.budgeted else None
        self.runtime, self.context_field = Runtime(loaded, batch_tokens), context_field
        self._device = loaded.device
        self._kept: dict[str, Memory] = {}  # the least recently used first

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability (nats) of every continuation as the base's reply, and whether greedy decoding would give it.

        The token that ends a reply is not scored. Whitespace before the continuation is dropped: in one running text it
        would part two words, but a reply starts a turn of its own.

        Raises:
            InputError: a continuation is empty.
        """
        asked = [self._parted(request) for request in requests]
        replies = [request.args[1].lstrip() for request in requests]
        if not all(replies):
            raise InputError("a continuation is empty; every choice needs a text that can be scored")

        def prompt(index: int, memory: int) -> Prompt:
            whole = self.runtime.question(memory, asked[index][1], replies[index])
            return replace(whole, reply=whole.reply[:-1])

        def answer(memories: list[Memory], prompts: list[Prompt], _: list[int], progress: Progress) -> list[Any]:
            scores = self.runtime.scored(memories, prompts, _read, progress)
            return [(float(score[:, 0].sum()), bool(score[:, 1].all())) for score in scores]

        return self._answers(requests, [document for document, _ in asked], prompt, answer)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability (nats) of every text as what follows its document at once, outside the chat format's turns.

        Raises:
            InputError: the text contains the document, which the memory would then be asked to recite.
        """
        documents = [self._document(request) for request in requests]
        for request, document in zip(requests, documents, strict=True):
            if document in request.args[0]:
                raise InputError(
                    f"the text to score contains the field {self.context_field!r}; give the text that follows it alone"
                )

        def prompt(index: int, memory: int) -> Prompt:
            return self.runtime.continuation(memory, requests[index].args[0])

        def answer(memories: list[Memory], prompts: list[Prompt], _: list[int], progress: Progress) -> list[float]:
            return [float(score.sum()) for score in self.runtime.log_likelihood(memories, prompts, progress)]

        return self._answers(requests, documents, prompt, answer)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy replies, trimmed and cut before the first string of `until`; at most `max_gen_toks` tokens (256).

        Raises:
            InputError: generation arguments that ask for anything but greedy decoding.
        """
        asked = [self._parted(request) for request in requests]
        limits = [_limits(request.args[1]) for request in requests]
        tokenizer = self.runtime.base.tokenizer

        def prompt(index: int, memory: int) -> Prompt:
            return self.runtime.question(memory, asked[index][1])

        def answer(memories: list[Memory], prompts: list[Prompt], order: list[int], progress: Progress) -> list[str]:
            longest = max(limits[index][0] for index in order)
            texts = []
            replies = self.runtime.generate_ids(memories, prompts, longest, progress=progress)
            for index, ids in zip(order, replies, strict=True):
                most, until = limits[index]
                text = tokenizer.decode(ids[:most], skip_special_tokens=True).strip()
                for stop in until:
                    text = text.partition(stop)[0]
                texts.append(text)
            return texts

        return self._answers(requests, [document for document, _ in asked], prompt, answer)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        base = self.runtime.base
        return {
            "hyperlora": hyperlora.__version__,
            "base": base.name,
            "fingerprint": vars(base.fingerprint),
            "method": self.method.name,
            **self.method.identity(),
        }

    @property
    def tokenizer_name(self) -> str:
        """Asked for when `--apply_chat_template` is given, which this model refuses."""
        raise InputError("leave out --apply_chat_template: questions are put into the base's chat format in any case")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """No template for the harness to apply. Raises InputError when it is asked for one."""
        return self.tokenizer_name if chat_template else ""

    # -- documents ----------------------------------------------------------------------------------------------------

    def _document(self, request: Instance) -> str:
        field = self.context_field
        if field not in request.doc:
            raise InputError(
                f"a row of the task {request.task_name} has no field {field!r}; set context_field to the one that "
                f"holds the document ({nearest(field, request.doc)})"
            )
        document = request.doc[field]
        if not isinstance(document, str) or not document.strip():
            raise InputError(f"the field {field!r} of a row of the task {request.task_name} is not a text")
        return document

    def _parted(self, request: Instance) -> tuple[str, str]:
        """Document and question of a request."""
        document = self._document(request)
        before, found, after = request.args[0].rpartition(document)
        if not found:
            raise InputError(
                f"a prompt of the task {request.task_name} does not contain its document word for word; name the field "
                f"that it shows with context_field (now {self.context_field!r})"
            )
        return document, (before + after).strip()

    def _memories(self, texts: list[str]) -> list[Memory]:
        """The memories of different documents, compiled together where they are not kept yet."""
        if new := [Document(sha256(text.encode()), text) for text in texts if text not in self._kept]:
            budgets = None
            if self.payer is not None:
                budgets = [memory.resident_bytes(self.runtime.base) for memory in self.payer.compile(new)]
            self._kept |= dict(zip((document.text for document in new), self.method.compile(new, budgets), strict=True))
        found = {text: self._kept.pop(text) for text in texts}
        self._kept |= found  # now the most recently used
        for text in list(self._kept)[:-KEPT]:
            del self._kept[text]
        return list(found.values())

    def _answers(
        self,
        requests: Sequence[Instance],
        documents: list[str],
        prompt: Callable[[int, int], Prompt],
        answer: Callable[[list[Memory], list[Prompt], list[int], Progress], list[Answer]],
    ) -> list[Answer]:
        """Answers in the order of the requests, worked out some documents at a time.

        Args:
            prompt: makes the prompt of a request, given its number and that of its memory.
            answer: gets memories, prompts, the numbers of their requests and a callback for progress.
        """
        places: dict[str, list[int]] = {}
        for index, document in enumerate(documents):
            places.setdefault(document, []).append(index)
        texts, found = list(places), {}
        with tqdm(total=len(requests), unit="request", desc=self.method.name, disable=None) as bar:
            for start in range(0, len(texts), UNIT):
                unit = texts[start : start + UNIT]
                memories = self._memories(unit)
                order = [index for text in unit for index in places[text]]
                prompts = [prompt(index, number) for number, text in enumerate(unit) for index in places[text]]
                for index, result in zip(order, answer(memories, prompts, order, bar.update), strict=True):
                    found[index] = result
                    # With --use_cache an interrupted run keeps what it has.
                    self.cache_hook.add_partial(requests[index].request_type, requests[index].args, result)
        return [found[index] for index in range(len(requests))]


def _read(logits: Tensor, targets: Tensor) -> Tensor:
    """Per token (tokens, 2): its log-probability, and 1 where it is the likeliest."""
    likely = -F.cross_entropy(logits, targets, reduction="none")
    return torch.stack([likely, (logits.argmax(-1) == targets).to(likely)], dim=-1)


def _limits(arguments: dict[str, Any]) -> tuple[int, list[str]]:
    """Longest reply in tokens and the strings that end one, of a request's generation arguments."""
    if unknown := [name for name in arguments if name not in _GENERATION]:
        raise InputError(f"unknown generation argument {unknown[0]!r}; {nearest(unknown[0], _GENERATION)}")
    warm = float(arguments.get("temperature") or 0.0) > 0
    if arguments.get("do_sample", warm):
        raise InputError("replies are greedy: take do_sample and temperature out of the generation arguments")
    lengths = [int(arguments[name]) for name in _LENGTHS if arguments.get(name) is not None]
    until = arguments.get("until") or []
    return (lengths or [256])[0], [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def main() -> None:
    """The command line of lm-evaluation-harness, with the model `hyperlora`."""
    from lm_eval.__main__ import cli_evaluate

    guarded(cli_evaluate)


if __name__ == "__main__":
    main()
