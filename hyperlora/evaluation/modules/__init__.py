"""The scores as modules of HuggingFace `evaluate`, loaded from here without a network.

`evaluate.load(module_path("rouge_l"))` and `load_metric("rouge_l")` give the same. The folders beside this file are
laid out as `evaluate` asks; they hold scripts that it copies, not packages to import.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hyperlora.errors import InputError, nearest

MODULES = ("answer_nll", "answer_scores", "bert_score", "llm_judge", "perplexity", "rouge_l")


def module_path(name: str) -> str:
    """The folder of a module, as `evaluate.load` takes it. Raises InputError for an unknown name."""
    if name not in MODULES:
        raise InputError(f"unknown metric {name!r}; {nearest(name, MODULES)}")
    return str(Path(__file__).parent / name)


def load_metric(name: str) -> Any:
    """The `evaluate.Metric` of that name. Raises InputError when it is unknown or `evaluate` is not installed."""
    path = module_path(name)
    try:
        import evaluate
    except ImportError as error:
        raise InputError("metric modules need the package evaluate; run: pip install 'hyperlora[eval]'") from error
    return evaluate.load(path)


def metric(
    name: str, description: str, compute: Callable[..., dict[str, float]], further: Sequence[str] = ("references",)
) -> Any:
    """A subclass of `evaluate.Metric`: a text for each of `predictions` and of the `further` columns, but a list of
    accepted texts for each of `references`."""
    import datasets
    import evaluate

    text = datasets.Value("string")
    columns = {column: datasets.Sequence(text) if column == "references" else text for column in further}
    features = datasets.Features({"predictions": text, **columns})

    def _info(self: Any) -> Any:
        info = {"description": description, "citation": "", "inputs_description": compute.__doc__ or ""}
        return evaluate.MetricInfo(**info, features=features)

    def _compute(self: Any, **inputs: Any) -> dict[str, float]:
        return compute(**inputs)

    return type(name, (evaluate.Metric,), {"_info": _info, "_compute": _compute, "__doc__": description})
