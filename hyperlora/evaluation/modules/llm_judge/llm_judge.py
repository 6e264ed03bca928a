"""How often a language model behind an OpenAI-compatible endpoint finds the predictions better than `others`, blind."""

from pathlib import Path

from hyperlora.evaluation.comparison import Comparison
from hyperlora.evaluation.endpoint import Endpoint
from hyperlora.evaluation.judge import judge
from hyperlora.evaluation.modules import metric


def compute(
    predictions: list[str],
    others: list[str],
    questions: list[str],
    contexts: list[str],
    references: list[list[str]],
    endpoint: str,
    model: str,
    cache: str = "judge-cache.jsonl",
    seed: int = 0,
) -> dict[str, float]:
    """predictions, others: two replies to each question; contexts: what it is about; references: accepted answers;
    endpoint: such as http://localhost:8000/v1; model: its name there; cache: file of verdicts. The key comes from the
    environment (HYPERLORA_JUDGE_KEY). Gives win_rate with its 95 % interval, low and high; ties count 1/2."""
    rows = zip(contexts, questions, references, predictions, others, strict=True)
    comparisons = [
        Comparison(str(number), context, question, tuple(accepted), first, second)
        for number, (context, question, accepted, first, second) in enumerate(rows)
    ]
    found = judge(comparisons, Endpoint(endpoint, model), Path(cache), seed)
    mean, low, high = found["win_rate"]
    counts = {name: float(found[name]) for name in ("wins", "losses", "ties", "unparsable")}
    return {"win_rate": mean, "low": low, "high": high, **counts}


LLMJudge = metric("LLMJudge", __doc__, compute, further=("others", "questions", "contexts", "references"))
