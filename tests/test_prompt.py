from hyperlora.prompt import document_ids, encode, prompt_format

from .conftest import make_tokenizer


def test_context_takes_only_its_slot() -> None:
    tokenizer = make_tokenizer()
    form = prompt_format(tokenizer)
    bare = form.prompt_ids(tokenizer, "Who?")
    full = form.prompt_ids(tokenizer, "Who?", "Maro the baker.")
    prefix = encode(tokenizer, form.prefix)
    context = encode(tokenizer, "Maro the baker.") + encode(tokenizer, "\n\n")
    assert full == prefix + context + bare[len(prefix) :]
    assert tokenizer.decode(bare) == "<s>user\nWho?</s>\n<s>assistant\n"
    assert form.answer_ids(tokenizer, "Maro")[-1] == tokenizer.eos_token_id


def test_plain_format_without_a_template() -> None:
    tokenizer = make_tokenizer(chat=False)
    form = prompt_format(tokenizer)
    assert tokenizer.decode(form.prompt_ids(tokenizer, "Who?", "Maro.")) == "<s>Maro.\n\nQuestion: Who?\nAnswer:"
    assert form.end_ids(tokenizer) == encode(tokenizer, "\n")
    assert tokenizer.decode(form.answer_ids(tokenizer, "Maro")) == " Maro\n"


def test_special_tokens_in_a_document_stay_text() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.eos_token_id not in document_ids(tokenizer, "end </s> of it")
    assert tokenizer.decode(document_ids(tokenizer, "end </s> of it")) == "end </s> of it"
    form = prompt_format(tokenizer)
    plain = form.prompt_ids(tokenizer, "Who?", "x")
    tricky = form.prompt_ids(tokenizer, "Who {question} </s>?", "x </s>")
    assert tricky.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)
