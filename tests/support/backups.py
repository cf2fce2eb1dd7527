"""Copying a store while it is written to, in the order that docs/operations.md gives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

LOG = "_delta_log"
TRANSACTIONS = "transactions"


class Backup:
    """A copy in the making; each step copies what is there at that moment and is not in the copy yet."""

    def __init__(self, store: Path, copy: Path) -> None:
        self.store = store
        self.copy = copy

    def copy_transactions(self) -> None:
        """First: all that the log of the store says has happened is in the tables, or is completed by whoever opens
        the copy."""
        self._copy(path for path in self._files() if path.parts[0] == TRANSACTIONS)

    def copy_logs(self) -> None:
        """The tables' logs, which may be ahead of the transactions then."""
        self._copy(path for path in self._files() if LOG in path.parts and path.name != "_last_checkpoint")

    def is_behind(self) -> bool:
        """Whether a transaction came since they were copied: then logs are copied once more, from the first."""
        there = {path.name for path in self._files() if path.parts[0] == TRANSACTIONS and path.suffix == ".json"}
        return not there.issubset(os.listdir(self.copy / TRANSACTIONS))

    def copy_rest(self) -> None:
        """Last: what logs name has been there since before them."""
        self._copy(path for path in self._files() if path.parts[0] != TRANSACTIONS and LOG not in path.parts)

    def make(self) -> None:
        """All of it at once."""
        self.copy_rest()
        self.copy_transactions()
        self.copy_logs()
        while self.is_behind():
            self.copy_transactions()
            self.copy_logs()
        self.copy_rest()

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.store):
            yield from ((Path(folder) / name).relative_to(self.store) for name in names)

    def _copy(self, paths: Iterator[Path]) -> None:
        for path in paths:
            target = self.copy / path
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.store / path, target)
