"""Commits to one table or two, compare-and-set, and what undoes a half of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from pipelines import storage
from pipelines.store.parquet import DataFile
from pipelines.store.table import CommitConflict, Table

# A running job's two commits lie milliseconds apart; see `repair`.
ORPHAN_GRACE_SECONDS = 2.0


def describe_file(table: Table, path: str) -> DataFile:
    """A DataFile of a file that exists but is not in the log, from its Parquet footer."""
    fs, full = storage.filesystem(storage.join(table.uri, path), table.options)
    with fs.open(full, "rb") as source:
        footer = pq.ParquetFile(source).metadata
    statistics = [footer.row_group(index).column(0).statistics for index in range(footer.num_row_groups)]
    return DataFile(
        path, fs.size(full), footer.num_rows, min(s.min for s in statistics), max(s.max for s in statistics)
    )


@dataclass
class FileChange:
    """Files to add to and remove from a table in one commit. rearranges: all rows stay, in other files."""

    add: list[DataFile] = field(default_factory=list)
    remove: list[str] = field(default_factory=list)
    rearranges: bool = False

    def reversed(self, table_files: dict[str, DataFile]) -> FileChange:
        added = [file.path for file in self.add]
        return FileChange([table_files[path] for path in self.remove], added, self.rearranges)


def commit_in_order(first: tuple[Table, FileChange], last: tuple[Table, FileChange], run_id: str) -> None:
    """Commit to two tables, of which the last one decides what is done.

    Raises CommitConflict, with the first table as before, when another run committed to either.
    """
    table, change = first
    before = table.files()
    table.commit(change.add, change.remove, run_id, rearranges=change.rearranges)
    try:
        last[0].commit(last[1].add, last[1].remove, run_id, rearranges=last[1].rearranges)
    except CommitConflict:
        apply_remaining(table, change.reversed(before), run_id)
        raise


def apply_remaining(table: Table, change: FileChange, run_id: str) -> None:
    """Commit whatever of `change` has not happened yet."""

    def attempt() -> None:
        files = table.files()
        add = [file for file in change.add if file.path not in files]
        remove = [path for path in change.remove if path in files]
        table.commit(add, remove, run_id, rearranges=change.rearranges)

    retry_on_conflict(attempt)


def retry_on_conflict(attempt: Callable[[], Any]) -> Any:
    """Run `attempt` until no other commit got in its way; it must look at the tables again each time."""
    while True:
        try:
            return attempt()
        except CommitConflict:
            continue
