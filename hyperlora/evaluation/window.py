"""Whether a base can read a whole document together with what is asked of it."""

from collections.abc import Sequence

from hyperlora.base_model import BaseModel
from hyperlora.data.items import Item
from hyperlora.errors import InputError
from hyperlora.prompt import GAP, document_ids, encode
from hyperlora.structure import context_window


def check_window(name: str, items: Sequence[Item], base: BaseModel, max_new_tokens: int) -> None:
    """Raises InputError, which begins with `name`, when a document in the prompt, with a question and
    `max_new_tokens` of a reply or with the text that follows, is beyond the model's window."""
    limit, tokenizer = context_window(base.model), base.tokenizer
    around = len(encode(tokenizer, base.prompt.prefix)) + len(encode(tokenizer, GAP))
    for item in items:
        asked = [
            len(base.prompt.question_ids(tokenizer, question.text))
            + max(max_new_tokens, len(base.prompt.answer_ids(tokenizer, question.reply)))
            for question in item.questions
        ]
        after = max(asked, default=len(document_ids(tokenizer, item.following)))
        if (length := around + len(document_ids(tokenizer, item.text)) + after) > limit:
            raise InputError(
                f"{name}, document {item.id}: {length} tokens with what is asked are beyond the model's window "
                f"of {limit}; choose shorter documents or another base"
            )
