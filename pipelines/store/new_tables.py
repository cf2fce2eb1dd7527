"""Making the tables of a store, which is a transaction like any other change."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pipelines.errors import JobError
from pipelines.storage.errors import reaching
from pipelines.storage.files import filesystem, join
from pipelines.storage.filesystems import Options
from pipelines.store.changes import Change, TableChange
from pipelines.store.snapshots import Snapshot
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import transact


def make_tables(log: TransactionLog, schemas: Mapping[str, pa.Schema], command: str) -> None:
    """Make those tables that are not there. Of two runs that make one table together the second finds it made.

    schemas: by the tables' paths in the store.

    Raises JobError for a table whose log is gone while its files are there: an empty table would hide them for good.
    """
    if all(_has_log(join(log.uri, path), log.options) for path in schemas):
        return

    def build(current: Snapshot) -> Change | None:
        missing = [TableChange(path, schema) for path, schema in schemas.items() if current.version(path) is None]
        for change in missing:
            _refuse_files_without_log(log, change.table)
        return Change(missing) if missing else None

    transact(log, build, run_id="", command=command)


def _refuse_files_without_log(log: TransactionLog, path: str) -> None:
    uri = join(log.uri, path)
    has_files = any(name.endswith(".parquet") for name in _names_in(uri, log.options))
    # looked at last: another run may have made the table, and have written to it, since the snapshot was taken
    if has_files and not _has_log(uri, log.options):
        raise JobError(
            f"The log of {uri} is gone, and files of the table are there: restore {uri}/_delta_log from a copy, or "
            f"remove {uri} for its rows to be made again."
        )


def _has_log(table: str, options: Options) -> bool:
    return any(name.endswith(".json") for name in _names_in(join(table, "_delta_log"), options))


def _names_in(folder: str, options: Options) -> list[str]:
    fs, path = filesystem(folder, options)
    try:
        with reaching(folder):
            return [str(name) for name in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
