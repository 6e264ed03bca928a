"""Training recipes: what a YAML file may say, checked before anything is loaded."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hyperlora.errors import InputError
from hyperlora.generator_config import GeneratorConfig
from hyperlora.settings import explain, read_yaml

Positive = Annotated[int, Field(gt=0)]


def _ordered(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError("the first number of a range must not exceed the second")
    return value


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FactsTask(_Strict):
    """Invented facts; `facts` is the least and largest number in a document, `questions` how many are asked."""

    task: Literal["facts"]
    weight: float = Field(1.0, gt=0)
    facts: Range = (2, 2)
    questions: Positive = 2


class QATask(_Strict):
    """Questions about documents of at most `max_tokens` from SQuAD-style sources."""

    task: Literal["qa"]
    weight: float = Field(1.0, gt=0)
    sources: list[str]
    max_tokens: Positive = 200
    questions: Positive = 1


class TextTask(_Strict):
    """Reconstruction of a piece of plain text (`tokens`: least and largest length) and its continuation."""

    task: Literal["text"]
    weight: float = Field(1.0, gt=0)
    sources: list[str]
    tokens: Range = (48, 160)
    following: Positive = 48


class Unrelated(_Strict):
    """Text the patch must leave alone: KL to the bare model on `tokens` tokens for a share of the documents."""

    sources: list[str]
    tokens: Positive = 64
    weight: float = Field(1.0, ge=0)
    share: float = Field(1.0, ge=0, le=1)


class Calibration(_Strict):
    """Generic text on which the sites' statistics are measured."""

    sources: list[str]
    texts: Positive = 32
    tokens: Positive = 384


class Evaluation(_Strict):
    """Items that are scored during training with the patch, another document's patch and none."""

    every: Positive = 50
    items: Positive = 32
    facts: list[Positive] = []
    qa: list[str] = []
    max_tokens: Positive = 200


class Recipe(_Strict):
    """A whole training run.

    Attributes:
        documents, micro_batches: a step reads `micro_batches` times `documents`. Several processes share out the
            micro-batches.
        strength_rate: learning rate of the parameters that set how strong a patch is; None for that of the rest.
    """

    base: str | None = None
    seed: int = 0
    steps: Positive
    documents: Positive = 8
    micro_batches: Positive = 1
    learning_rate: float = Field(1e-3, gt=0)
    strength_rate: float | None = Field(None, gt=0)
    warmup: int = Field(10, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    save_every: Positive = 50
    generator: GeneratorConfig = GeneratorConfig()
    start_from: str | None = None
    calibration: Calibration
    mix: list[Annotated[FactsTask | QATask | TextTask, Field(discriminator="task")]] = Field(min_length=1)
    unrelated: Unrelated | None = None
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _one_origin(self) -> "Recipe":
        if self.start_from and "generator" in self.model_fields_set:
            raise ValueError("start_from brings the settings of its generator; leave out the key 'generator'")
        return self


def read_recipe(path: Path, **changes: Any) -> Recipe:
    """Read and check a recipe; `changes` replace top-level keys.

    Raises:
        InputError: not YAML, an unknown key (with the nearest known ones) or a wrong type, in one line.
    """
    content = read_yaml(path, "recipe")
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a recipe: expected keys and values at the top level")
    content.update({key: value for key, value in changes.items() if value is not None})
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, _keys(error.errors()[0]['loc']))}") from error


def _keys(where: tuple[int | str, ...]) -> list[str]:
    """The keys allowed beside the one at `where`."""
    tables: dict[str, Any] = {
        "generator": GeneratorConfig,
        "calibration": Calibration,
        "unrelated": Unrelated,
        "evaluation": Evaluation,
        "facts": FactsTask,
        "qa": QATask,
        "text": TextTask,
    }
    owner = next((tables[str(part)] for part in reversed(where[:-1]) if str(part) in tables), Recipe)
    return list(owner.model_fields)
