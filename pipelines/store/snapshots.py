"""A store as one transaction left it: versions of tables that belong together, and what results point at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines.errors import JobError
from pipelines.storage.errors import said
from pipelines.store.changes import Pointer, Transaction
from pipelines.store.damage import DamagedLog, run_repair
from pipelines.store.parquet import DataFile
from pipelines.store.publishing import (
    as_table,
    delta_for_writing,
    delta_of,
    files_for_writing,
    number_in,
    number_of,
)
from pipelines.store.table import Table, repeated
from pipelines.store.transaction_log import TransactionLog


@dataclass
class Snapshot:
    """The store after the transaction `number`, which every table has; 0 is the store before any.

    Tables are opened when they are asked for, whenever that is: each at its newest version that no later transaction
    made. Nothing is written.

    for_writing: by the one who decides the next change, and uses no older snapshot any more. opened: so far.
    """

    log: TransactionLog
    transaction: Transaction | None
    for_writing: bool = False
    opened: dict[str, DeltaTable | None] = field(default_factory=dict)
    _files: dict[str, Mapping[str, DataFile]] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.transaction.number if self.transaction else 0

    @property
    def pointers(self) -> Mapping[str, Pointer]:
        return self.transaction.pointers if self.transaction else {}

    def table(self, path: str, schema: pa.Schema | None = None) -> Table | None:
        """A table at the version of this snapshot, or None where there is none.

        path: in the store, such as `patches`. schema: as the columns are wanted; the table's own where nobody says.

        Raises JobError for a log that is damaged, or does not reach back to this snapshot.
        """
        delta = self._delta(path)
        return None if delta is None else as_table(self.log, path, delta, schema)

    def files(self, path: str) -> Mapping[str, DataFile]:
        """The files of a table by their paths in it; none where there is no table."""
        if path not in self._files:
            delta = self._delta(path)
            if delta is None:
                self._files[path] = {}
            elif self.for_writing:
                self._files[path] = files_for_writing(self.log, path, delta)
            else:
                self._files[path] = as_table(self.log, path, delta).files()
        return self._files[path]

    def version(self, path: str) -> int | None:
        """The Delta version of a table, for readers of their own; None where there is no table."""
        delta = self._delta(path)
        return None if delta is None else delta.version()

    def _delta(self, path: str) -> DeltaTable | None:
        if path not in self.opened:
            delta = (delta_for_writing if self.for_writing else delta_of)(self.log, path)
            number = 0 if delta is None else number_in(self.log, path, delta)
            if delta is not None and number > self.number:
                number = self._go_back(path, delta, number)
            if delta is not None and number < (expected := self._number_expected(path, delta)):
                raise DamagedLog(
                    f"{self.log.uri}/{path} does not have transaction {expected}, which {self.log.folder} says it "
                    "has: a part of its log is lost or was put back, or the store was copied while it was written to. "
                    f"Copy or restore it whole, or {run_repair(self.log.uri)}."
                )
            self.opened[path] = delta
        return self.opened[path]

    def _number_expected(self, path: str, delta: DeltaTable) -> int:
        """The last transaction that changed a table, as far as that is known."""
        if self.transaction is None:
            return 0
        if path in self.transaction.changed:
            return self.transaction.changed[path]
        # in logs from before it was noted; one at version 0 was removed and begun again since
        of_table = [entry for entry in self.transaction.tables if entry.table == path]
        changed = any(entry.add or entry.remove for entry in of_table) and delta.version() > 0
        return self.number if changed else 0

    def _go_back(self, path: str, delta: DeltaTable, number: int) -> int:
        """Have a table at the version before those of later transactions, which is mostly the one before; the number of
        the last transaction that touched it then."""
        if number > (newest := self.log.listing().newest):
            raise DamagedLog(
                f"{self.log.uri}/{path} has transaction {number}, and {self.log.folder} ends at {newest}: "
                "files of it were removed, or the store was copied while it was written to. Copy or restore it whole."
            )
        while number > self.number:
            before = delta.version() - 1
            try:
                repeated(partial(delta.load_as_version, before), self.log.uri)
            except DeltaError as error:
                raise JobError(
                    f"The log of {self.log.uri}/{path} does not reach back to transaction {self.number} "
                    f"({said(error)}): run the same command again."
                ) from None
            number = number_of(delta)
        return number


def snapshot(log: TransactionLog) -> Snapshot:
    """What readers see: the newest transaction that every table has. Nothing is written, repaired or made.

    Raises JobError for a damaged log, RequestError for one of a newer dinoray.
    """
    return Snapshot(log, log.published())
