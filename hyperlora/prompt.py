"""The prompt slot: prefix, context and suffix of one chat turn, so that a memory can take the context's place."""

from dataclasses import dataclass
from typing import Any

_SLOT = "\u2402slot\u2402"
GAP = "\n\n"  # between the context and the question
_LINE_BREAKS = ("\n", "\u010a", "<0x0A>")  # as vocabularies write them: plain, of byte-level BPE, of single bytes
_REPLY = "\u2402reply\u2402"
_DAY = "26 Jul 2024"
_CLOCK = "{%- macro strftime_now(format) -%}" + _DAY + "{%- endmacro -%}"


@dataclass(frozen=True)
class PromptFormat:
    """How a base model is asked: the text around the user's words and after the model's.

    The parts are tokenised separately, so that a prompt without its context differs in nothing else.

    Attributes:
        prefix: from the start of the conversation to the user's words, special tokens included.
        suffix: from the end of the user's words to where the reply starts.
        end: what ends a reply; its first token stops generation.
        question: format of the user's words after the context.
        lead: what stands between the suffix and the reply.
    """

    prefix: str
    suffix: str
    end: str
    question: str = "{question}"
    lead: str = ""

    def prompt_ids(self, tokenizer: Any, question: str, context: str | None = None) -> list[int]:
        """Token ids of one prompt, with the document in it or (None) without."""
        ids = encode(tokenizer, self.prefix)
        if context is not None:
            ids += document_ids(tokenizer, context) + encode(tokenizer, GAP)
        return ids + self.question_ids(tokenizer, question)

    def question_ids(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of what comes after the context slot."""
        asked = self.question.replace("{question}", question)
        return document_ids(tokenizer, asked) + encode(tokenizer, self.suffix)

    def answer_ids(self, tokenizer: Any, answer: str) -> list[int]:
        """Token ids of a reply and of the token that ends it."""
        return document_ids(tokenizer, self.lead + answer) + self.end_ids(tokenizer)[:1]

    def end_ids(self, tokenizer: Any) -> list[int]:
        """Token ids of what ends a reply, behind a reply; from the first special token on where there is one."""
        return _behind_a_reply(tokenizer, self.end)

    def stop_ids(self, tokenizer: Any) -> set[int]:
        """Tokens that end a reply: the first of `end`, and where that is a line break, all tokens with one in them."""
        ends = set(self.end_ids(tokenizer)[:1])
        if self.end.isspace():
            likely = (i for text, i in tokenizer.get_vocab().items() if any(mark in text for mark in _LINE_BREAKS))
            ends |= {i for i in likely if self.end in tokenizer.decode([i])}
        return ends


def _behind_a_reply(tokenizer: Any, end: str) -> list[int]:
    """Alone, tokenizers that mark the starts of words would put such a mark in front of it."""
    reply = encode(tokenizer, "x")
    whole = encode(tokenizer, "x" + end)
    ids = whole[len(reply) :] if whole[: len(reply)] == reply else encode(tokenizer, end)
    special = set(tokenizer.all_special_ids)
    return next((ids[start:] for start, token in enumerate(ids) if token in special), ids)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone: no special token is added, those written out in a template are recognised."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a document, in which text that looks like a special token stays plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []


def whole(tokenizer: Any, ids: list[int]) -> str:
    """The text of some tokens out of a longer one, without characters that were cut in two at its ends."""
    return tokenizer.decode(ids).strip("\ufffd")


def prompt_format(tokenizer: Any) -> PromptFormat:
    """The model's own chat template, or a plain question-and-answer format when it has none.

    Templates that let a model think first are asked not to (`enable_thinking`), and those that can be given a date
    (`date_string`) or look for one (`strftime_now`) always get the same: a memory must fit the prompts of other days.
    """
    if getattr(tokenizer, "chat_template", None):
        options = {"tokenize": False, "enable_thinking": False, "date_string": _DAY}
        if "strftime_now" in (template := tokenizer.get_chat_template()):
            options["chat_template"] = _CLOCK + template
        turn = [{"role": "user", "content": _SLOT}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, **options)
        told = tokenizer.apply_chat_template(
            [*turn, {"role": "assistant", "content": _REPLY}], add_generation_prompt=False, **options
        )
        prefix, _, suffix = asked.partition(_SLOT)
        end = told.partition(_REPLY)[2]
        if suffix and end:
            return PromptFormat(prefix, suffix, end)
    start = tokenizer.bos_token or ""
    return PromptFormat(start, "\nAnswer:", "\n", "Question: {question}", lead=" ")
