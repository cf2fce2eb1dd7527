"""Tables, and the tables that name their files: what has to be known to merge the files."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.store.parquet import DataFile, new_file_name, run_id_of
from pipelines.store.table import Table

# Larger files stay as they are.
SMALL_FILE_SHARE_OF_TARGET = 0.5


@dataclass(frozen=True)
class LinkedTables:
    """A table of data and, where there is one, the leading table whose rows name the data's files in `shard`.

    run_in_names: the data's file names say which training they come from, and keep saying it.
    """

    data: Table
    leading: Table | None = None
    run_in_names: bool = False

    @property
    def both(self) -> list[Table]:
        return [self.data] if self.leading is None else [self.data, self.leading]

    def groups(self, target: int) -> list[list[DataFile]]:
        """Small files of the data, neighbours in key order, that together make a file of about `target` bytes."""
        small = [file for file in self.data.files().values() if file.size < SMALL_FILE_SHARE_OF_TARGET * target]
        found: list[list[DataFile]] = []
        # in key order, and of one training
        for file in sorted(small, key=lambda file: (self._training(file), file.min_id, file.max_id, file.path)):
            group = found[-1] if found else []
            fits = group and self._training(group[0]) == self._training(file)
            if fits and sum(one.size for one in group) + file.size <= target:
                group.append(file)
            else:
                found.append([file])
        return [group for group in found if len(group) > 1]

    def new_name(self, group: list[DataFile], run_id: str) -> str:
        """A name for the file that a group is merged into."""
        return new_file_name(self._training(group[0]) or run_id)

    def _training(self, file: DataFile) -> str:
        return run_id_of(file.path) if self.run_in_names else ""
