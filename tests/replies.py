"""Replies as `hyperlora compare` leaves them: nine questions on six documents of two tasks."""

import json
from pathlib import Path
from typing import Any

HEAD = "head, 1/2 of it"


def line(task: str, number: int, question: int) -> dict[str, Any]:
    """`patch` is right but for the second question on every document; `HEAD` answered the first two documents only."""
    replies = {"patch": ("Maro", "Jan")[question], "full": ("Jan", "Maro")[question]}
    return {
        "task": task,
        "document": f"doc-{number}",
        "text": f"Maro is in {task},\nnumber {number}.",
        "question": f"Who is {number}.{question}?",
        "accepted": ["Maro", "M."],
        "replies": replies | ({HEAD: "Nobody"} if number < 2 else {}),
    }


LINES = [line("squad", i, j) for i in range(4) for j in range(1 + (i > 0))] + [line("notes", i, 0) for i in range(2)]


def write(folder: Path, lines: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "replies.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder
