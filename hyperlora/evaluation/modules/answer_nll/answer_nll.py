"""Loss of answers to questions, with the document in a language model's prompt: nats per token, mean over answers."""

from statistics import fmean

from hyperlora.base_model import load_base
from hyperlora.evaluation.modules import metric
from hyperlora.memory import Memory
from hyperlora.prompt import document_ids
from hyperlora.runtime import Runtime


def compute(
    predictions: list[str], questions: list[str], contexts: list[str], base: str | None = None
) -> dict[str, float]:
    """predictions: answers to score; questions, contexts: what each is about, the context empty for none; base: what
    `hyperlora.load_base` takes."""
    loaded = load_base(base)
    runtime = Runtime(loaded)
    memories = [Memory(text=tuple(document_ids(loaded.tokenizer, context))) for context in contexts]
    asked = enumerate(zip(questions, predictions, strict=True))
    prompts = [runtime.question(number, question, answer) for number, (question, answer) in asked]
    return {"answer_nll": fmean(-float(scores.mean()) for scores in runtime.log_likelihood(memories, prompts))}


AnswerNLL = metric("AnswerNLL", __doc__, compute, further=("questions", "contexts"))
