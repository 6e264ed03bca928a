"""Whether documents can be compared on: neither beyond the base's window with what is asked, nor next to nothing."""

from collections.abc import Sequence

from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item
from hyperlora.errors import InputError
from hyperlora.prompt import GAP, document_ids, encode
from hyperlora.structure import context_window

_LEAST = 2  # tokens, of which a generator makes a patch; less is refused for all methods, which meet on all documents


def check_length(name: str, items: Sequence[Item], base: BaseModel) -> None:
    """Raises InputError, which begins with `name`, when a document has fewer tokens than every method can read."""
    for item in items:
        if (length := len(document_ids(base.tokenizer, item.text))) < _LEAST:
            raise InputError(
                f"{name}, document {item.id}: {length} token(s), but a patch needs {_LEAST} or more to be made of; "
                "give a longer document or leave it out"
            )


def check_window(name: str, items: Sequence[Item], base: BaseModel, max_new_tokens: int) -> None:
    """Raises InputError, which begins with `name`, when a document has too few tokens (`check_length`), or in the
    prompt, with a question and `max_new_tokens` of a reply or with the text that follows, is beyond the model's
    window."""
    check_length(name, items, base)
    tokenizer = base.tokenizer
    for item in items:
        asked = [
            len(base.prompt.question_ids(tokenizer, question.text))
            + max(max_new_tokens, len(base.prompt.answer_ids(tokenizer, question.reply)))
            for question in item.questions
        ]
        after = max(asked, default=len(document_ids(tokenizer, item.following)))
        check_fits(f"{name}, document {item.id}", item.text, after, base)


def check_fits(name: str, text: str, after: int, base: BaseModel) -> None:
    """Raises InputError, which begins with `name`, when a document in the prompt, with `after` tokens behind it, is
    beyond the model's window."""
    limit, tokenizer = context_window(base.model), base.tokenizer
    around = len(encode(tokenizer, base.prompt.prefix)) + len(encode(tokenizer, GAP))
    if (length := around + len(document_ids(tokenizer, text)) + after) > limit:
        raise InputError(
            f"{name}: {length} tokens with what is asked are beyond the model's window of {limit}; choose shorter "
            "documents or another base"
        )
