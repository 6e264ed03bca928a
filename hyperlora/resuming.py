"""Whether a checkpoint is one that a run may go on from: the same recipe, data, base and modules."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hyperlora.data.items import Item
from hyperlora.data.teacher import TeacherCorpus
from hyperlora.errors import InputError
from hyperlora.fingerprint import Fingerprint
from hyperlora.generator import Generator
from hyperlora.recipe import Recipe

# What a resumed recipe may change, and what it may as long as the product stays: the same documents are drawn.
_FREE = ("checkpointing", "evaluation", "learning_rate", "save_every", "steps")
_SPLIT = ("documents", "micro_batches")


def data_hash(documents: Iterable[Item], teachers: Sequence[TeacherCorpus]) -> str:
    """Of the documents that a run draws from, what is asked about them and how the teachers' replies were made."""
    digest = hashlib.sha256()
    asked = ([item.text, *map(vars, item.questions)] for item in documents)
    for part in chain(asked, (teacher.settings for teacher in teachers)):
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def own_position(recipe: Recipe, generator: Generator, data: str) -> dict[str, Any]:
    """What `check_own` compares, for a checkpoint's position; `data` is a `data_hash`."""
    return {
        "data": data,
        "sites": [site.path for site in generator.sites],
        "fingerprint": vars(generator.base.fingerprint),
        "generator": generator.config.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
    }


def check_own(folder: Path, position: dict[str, Any], own: dict[str, Any], generator: Generator) -> None:
    """Raises InputError when the position of the checkpoint in `folder` is one of another run than `own`.

    Positions of older versions lack some of what is compared.
    """
    if changed := _changed(folder, position, own):
        raise InputError(f"{folder} holds another recipe's run ({', '.join(changed)} differ); choose another -o")
    if "fingerprint" in position and not generator.base.fingerprint.same(Fingerprint(**position["fingerprint"])):
        raise InputError(
            f"{folder} holds a run on another base than {generator.base.name}; choose another -o, or --base"
        )
    if position.get("sites", own["sites"]) != own["sites"]:
        raise InputError(
            f"{folder} holds a run on other modules, such as the default of an earlier version; choose another -o"
        )
    if position.get("data", own["data"]) != own["data"]:
        raise InputError(
            f"{folder} holds a run on other documents, or on other replies of a teacher, under the same names; bring "
            "those back, or choose another -o"
        )


def _changed(folder: Path, position: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """The recipe's keys that differ and may not."""
    now = own["recipe"]
    try:  # what an older version did not know has its default
        then = Recipe.model_validate(position["recipe"]).model_dump(mode="json")
    except ValidationError as error:
        raise InputError(f"{folder} holds a recipe that this version cannot read; choose another -o") from error
    known = ("base",) if "fingerprint" in position else ()  # by its fingerprint, whatever it is called
    free = (*_FREE, *known, *(("strength_rate",) if now["strength_rate"] and then["strength_rate"] else ()))
    changed = [key for key in now if now[key] != then[key] and key not in free]
    if math.prod(now[key] for key in _SPLIT) == math.prod(then[key] for key in _SPLIT):
        changed = [key for key in changed if key not in _SPLIT]
    if position.get("generator", own["generator"]) != own["generator"] and "generator" not in changed:
        changed.append("generator")
    return changed
