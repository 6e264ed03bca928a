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
_Piece = Annotated[int, Field(ge=2)]  # of which a patch can be made
Pieces = Annotated[tuple[_Piece, _Piece], AfterValidator(_ordered)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Task(_Strict):
    """`weight`: how often the task is drawn; `from_step`, `to_step`: only in these steps, for a curriculum."""

    weight: float = Field(1.0, gt=0)
    from_step: int = Field(0, ge=0)
    to_step: Positive | None = None

    def drawn_in(self, step: int) -> bool:
        return self.from_step <= step and (self.to_step is None or step < self.to_step)


class FactsTask(_Task):
    """Invented facts; `facts` is the least and largest number in a document, `questions` how many are asked. With
    sources of a `haystack` the facts stand between the sentences of a piece of text, of least and most `tokens`; with
    sources of `words` half of the facts are of kinds and values that are words from there."""

    task: Literal["facts"]
    facts: Range = (2, 2)
    questions: Positive = 2
    haystack: list[str] = []
    tokens: Pieces = (48, 160)
    words: list[str] = []


class QATask(_Task):
    """Questions about documents of at most `max_tokens` from SQuAD-style sources."""

    task: Literal["qa"]
    sources: list[str]
    max_tokens: Positive = 200
    questions: Positive = 1


class TextTask(_Task):
    """Reconstruction of a piece of plain text (`tokens`: least and largest length) and its continuation."""

    task: Literal["text"]
    sources: list[str]
    tokens: Pieces = (48, 160)
    following: Positive = 48


class MadeTask(_Task):
    """Questions made by rule from pieces of plain text (`tokens`: least and largest length)."""

    task: Literal["made"]
    sources: list[str]
    tokens: Pieces = (48, 200)
    questions: Positive = 2


Share = Annotated[float, Field(ge=0, le=1)]


class Unrelated(_Strict):
    """Text the patch must leave alone: KL to the bare model on `tokens` tokens for a `share` of the documents, of which
    a share `in_prompt` stands where a prompt has its document."""

    sources: list[str]
    tokens: Positive = 64
    weight: float = Field(1.0, ge=0)
    share: Share = 1.0
    in_prompt: Share = 0.0


class Beside(_Strict):
    """What a prompt says has the last word: for a `share` of the documents, with their patch on, a question about the
    next one of the step, which stands in the prompt."""

    weight: float = Field(1.0, ge=0)
    share: Share = 0.25


class Teacher(_Strict):
    """What the base says with the document in its prompt, as a target.

    Attributes:
        corpora: folders of `hyperlora teach`. Questions that are found there are trained on the teacher's reply and its
            likeliest tokens, all others on their own reply.
        contrast: weight of a taught token is 1 + `contrast` times the nats that the document is worth to it (0 to 5).
        nll: weight of the negative log-likelihood of the reply beside the divergence from its likeliest tokens.
        hidden: weight of the distance from the teacher's hidden states at the labels of all questions, behind
            `hidden_layers` evenly spread layers; the teacher reads anew in every step.
    """

    corpora: list[str] = []
    contrast: float = Field(default=0.0, ge=0)
    nll: float = Field(default=0.0, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    hidden_layers: Positive = 4


class Calibration(_Strict):
    """Generic text on which the sites' statistics are measured."""

    sources: list[str]
    texts: Positive = 32
    tokens: Positive = 384


class Evaluation(_Strict):
    """Items that are scored during training with the patch and another document's patch; `new_attributes`: facts of
    kinds that are never trained on."""

    every: Positive = 50
    items: Positive = 32
    facts: list[Positive] = []
    new_attributes: bool = False
    qa: list[str] = []
    max_tokens: Positive = 200


class Recipe(_Strict):
    """A whole training run.

    Attributes:
        documents, micro_batches: a step reads `micro_batches` times `documents`. Several processes share out the
            micro-batches.
        checkpointing: keep no activations inside layers and hypernetwork, and compute them again in the backward pass.
        strength_rate: learning rate of the parameters that set how strong a patch is; None for that of the rest.
        trained: parts of the names of the hypernetwork's parameters that are trained; empty for all of them.
        start_from: a generator whose weights are the first. What `generator` says differs from its settings; parameters
            that this adds start as in a fresh one.
    """

    base: str | None = None
    seed: int = 0
    steps: Positive
    documents: Positive = 8
    micro_batches: Positive = 1
    learning_rate: float = Field(1e-3, gt=0)
    strength_rate: float | None = Field(None, gt=0)
    trained: list[Annotated[str, Field(min_length=1)]] = []
    warmup: int = Field(10, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    checkpointing: bool = False
    save_every: Positive = 50
    generator: GeneratorConfig = GeneratorConfig()
    start_from: str | None = None
    calibration: Calibration
    mix: list[Annotated[FactsTask | QATask | TextTask | MadeTask, Field(discriminator="task")]] = Field(min_length=1)
    unrelated: Unrelated | None = None
    beside: Beside | None = None
    teacher: Teacher = Teacher()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _no_gap(self) -> "Recipe":
        ends = {0, *(task.from_step for task in self.mix), *(task.to_step or 0 for task in self.mix)}
        for step in sorted(end for end in ends if end < self.steps):
            if not any(task.drawn_in(step) for task in self.mix):
                raise ValueError(f"no task of the mix is drawn in step {step}; change from_step or to_step")
        return self

    @model_validator(mode="after")
    def _something_beside(self) -> "Recipe":
        if self.beside and self.documents * self.micro_batches < 2:
            raise ValueError("beside asks about the next document of a step; take two or more documents to a step")
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
        "beside": Beside,
        "teacher": Teacher,
        "evaluation": Evaluation,
        "facts": FactsTask,
        "qa": QATask,
        "text": TextTask,
        "made": MadeTask,
    }
    owner = next((tables[str(part)] for part in reversed(where[:-1]) if str(part) in tables), Recipe)
    return list(owner.model_fields)
