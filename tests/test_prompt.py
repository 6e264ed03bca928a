from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hyperlora.prompt import document_ids, encode, prompt_format, whole

from .conftest import CHAT, TEXT, make_tokenizer


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


def sentence_piece(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a mark in front of what it is given, as Llama 2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=["\u2581", "\n"])
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def test_a_reply_ends_with_what_stands_behind_it() -> None:
    """Not with the mark of a word's start, which a reply is full of."""
    tokenizer = sentence_piece(None)
    form = prompt_format(tokenizer)
    assert encode(tokenizer, "\n") != form.end_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(form.end_ids(tokenizer)) == ["\n"]
    tokenizer = sentence_piece(CHAT.replace("</s>", " </s>"))
    form = prompt_format(tokenizer)
    assert form.end.startswith(" </s>")
    assert form.answer_ids(tokenizer, "Maro")[-1] == tokenizer.eos_token_id
    assert form.stop_ids(tokenizer) == {tokenizer.eos_token_id}


def test_a_blank_line_ends_a_plain_reply_too() -> None:
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_tokens(["\n\n"])  # one token, as in many vocabularies
    (blank,) = encode(tokenizer, "\n\n")
    assert prompt_format(tokenizer).stop_ids(tokenizer) == {encode(tokenizer, "\n")[0], blank}


def test_templates_do_not_think_and_do_not_tell_the_day() -> None:
    tokenizer = make_tokenizer()
    thinking = "{% if enable_thinking is not defined or enable_thinking %}<think>{% else %}<think></think>{% endif %}"
    day = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    tokenizer.chat_template = day + CHAT.replace("assistant\n{% endif", f"{thinking}{{% endif")
    form = prompt_format(tokenizer)
    assert form.suffix.endswith("<think></think>") and form.prefix.startswith("26 Jul 2024<s>")


def test_the_day_is_not_in_the_prompt() -> None:
    """Of templates that look for it or are told it."""
    for day in ("{{ strftime_now('%d %b %Y') }}", "{{ date_string }}"):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "Today is " + day + ". " + CHAT
        assert prompt_format(tokenizer).prefix.startswith("Today is 26 Jul 2024. ")


def test_a_line_break_inside_a_token_ends_a_reply() -> None:
    tokenizer = make_tokenizer(chat=False)
    tokenizer.add_tokens([".\n", ". ", "\n\n"])
    stop = prompt_format(tokenizer).stop_ids(tokenizer)
    assert {tokenizer.decode([token]) for token in stop} == {"\n", ".\n", "\n\n"}


def test_no_half_characters_at_the_ends_of_a_piece() -> None:
    tokenizer = make_tokenizer()
    ids = document_ids(tokenizer, "日本語")
    assert len(ids) == 9 and "\ufffd" in tokenizer.decode(ids[1:8])
    assert whole(tokenizer, ids[1:8]) == "本"
