"""metrics.jsonl, what a training run has measured: one record for each step, and for each set that was scored."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hyperlora import ranks
from hyperlora.files import write_text

NAME = "metrics.jsonl"


class RunLog:
    """The file in a run's folder. Of several processes the first one alone writes and reads it."""

    def __init__(self, folder: Path):
        self.path = folder / NAME

    def write(self, record: dict[str, Any]) -> None:
        if ranks.own() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        whole = self.path.read_text().split("\n")[:-1]  # a killed process may leave half a line
        return [json.loads(line) for line in whole]

    def unscored(self, step: int, names: Iterable[str]) -> list[str]:
        """Those of the evaluation sets that have no scores at a step, as all processes are told."""
        names = list(names)
        missing = [0.0] * len(names)
        if ranks.own() == 0:
            done = {record.get("evaluation") for record in self.records() if record["step"] == step}
            missing = [float(name not in done) for name in names]
        return [name for name, flag in zip(names, ranks.total(missing), strict=True) if flag]

    def forget_after(self, step: int) -> None:
        """Drop the records of steps that will be repeated."""
        if self.path.exists() and ranks.own() == 0:
            kept = [record for record in self.records() if record["step"] <= step]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def summary(self) -> dict[str, Any]:
        """The losses of the last step, and the last scores of every evaluation set."""
        found: dict[str, Any] = {"evaluation": {}}
        for record in self.records():
            if name := record.pop("evaluation", None):
                found["evaluation"][name] = record
            else:
                found |= {"loss": record["loss"], "unrelated": record["unrelated"]}
        return found
