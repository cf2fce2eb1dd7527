"""Files that a `build` writes: once, however often it is called, and gone again where nothing came of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field

from pipelines.storage.files import filesystem, join
from pipelines.store.changes import Change
from pipelines.store.parquet import DataFile
from pipelines.store.table import Table


@dataclass
class WrittenFiles:
    """What one change to a store has written so far.

    A change that removes rows from hundreds of files takes minutes. When another transaction was first, only the files
    that it changed are written again, so such a change comes through beside others that are quick.
    """

    _made: dict[Hashable, tuple[Table, DataFile | None]] = field(default_factory=dict)

    def once(self, table: Table, what: Hashable, write: Callable[[], DataFile | None]) -> DataFile | None:
        """What `write` returned when it was first called for this; `what` tells the files of a table apart."""
        key = (table.uri, what)
        if key not in self._made:
            self._made[key] = (table, write())
        return self._made[key][1]

    def remove_unused(self, change: Change | None) -> None:
        """Remove what the change that was made does not name. To be called only when it is known what was made."""
        named = {file.path for table in change.tables for file in table.add} if change else set()
        unused = [(table, file) for table, file in self._made.values() if file and file.path not in named]
        remove_files(unused)


def remove_files(files: Collection[tuple[Table, DataFile]]) -> None:
    """Remove files that no transaction names; one that stays is garbage, which `compact` removes later."""
    for table, file in files:
        with contextlib.suppress(OSError):
            fs, path = filesystem(join(table.uri, file.path), table.options)
            fs.rm_file(path)
