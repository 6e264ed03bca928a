"""Finished records, kept as they end: an append-only JSONL that survives being killed at any time."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperlora.files import keep, read_kept


class Cache:
    """Records by key. Every shard appends to a file of its own; all files of the folder are read."""

    def __init__(self, folder: Path, shard: str = "whole"):
        self.folder, self.path = folder, folder / f"records-{shard}.jsonl"
        self.records: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Take in what all shards have kept until now."""
        for path in sorted(self.folder.glob("records-*.jsonl")):
            self.records |= read_kept(path)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> Any:
        return self.records[key]

    def add(self, records: Mapping[str, Any]) -> None:
        """Keep these records, all of them at once."""
        self.records |= records
        keep(self.path, records)


def digest(*parts: Any) -> str:
    """A key: the hash of everything that determines a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
