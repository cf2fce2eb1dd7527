"""A Delta table as a store reads it: its files, what the log says of them, and rows of those whose key range matters.

What changes tables is pipelines.store.transactions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from pipelines.errors import JobError
from pipelines.storage.errors import explain_read_error, said
from pipelines.storage.files import filesystem, is_there, join, normalise
from pipelines.storage.filesystems import Options, delta_options, is_local
from pipelines.store.damage import DamagedLog, run_repair, store_of
from pipelines.store.parquet import DataFile, described, open_parquet, write_parquet

READS_AT_ONCE = 16
REMOTE_STORAGE_TRIES = 4
FIRST_PAUSE_SECONDS = 0.2
# Commits that leave all rows as they were carry it in the log.
CONTENT_VERSION_KEY = "content_version"

_T = TypeVar("_T")


def open_delta(uri: str, options: Options | None = None) -> DeltaTable | None:
    """A table at its newest version, or None where there is none. Nothing is made.

    Raises JobError for a log that cannot be read.
    """
    try:
        return repeated(lambda: DeltaTable(uri, storage_options=delta_options(uri, options)), uri)
    except TableNotFoundError:
        return None
    except DeltaError as error:
        if explained := explain_read_error(error, uri):
            raise explained from None
        raise DamagedLog(f"The log of {uri} is damaged ({said(error)}): {run_repair(store_of(uri))}.") from None


def open_table(uri: str, schema: pa.Schema, options: Options | None = None) -> Table | None:
    """A table at its newest version, or None where there is none. Raises as `open_delta` does."""
    uri = normalise(uri)
    delta = open_delta(uri, options)
    return None if delta is None else Table(uri, schema, options, delta)


def repeated(read: Callable[[], _T], uri: str) -> _T:
    """Read from a table's log; from remote storage again when an answer broke off, which delta-rs does not repeat."""
    for attempt in range(REMOTE_STORAGE_TRIES - 1):
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if is_local(uri):
                raise
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    return read()


class Table:
    """One Delta table of a store, at the version of the last `refresh`."""

    def __init__(self, uri: str, schema: pa.Schema, options: Options | None, delta: DeltaTable) -> None:
        """schema: as the columns are read. delta: the table at the version that counts."""
        self.uri = normalise(uri)
        self.schema = schema
        # files are in the order of the key, and their log entries carry its range
        self.key = schema.names[0]
        self.options = options or {}
        self._delta = delta
        self._version_and_its_content_version: tuple[int, int] | None = None

    @property
    def version(self) -> int:
        return self._delta.version()

    @property
    def content_version(self) -> int:
        """The version since which no commit changed rows: `compact` only moves them."""
        known = self._version_and_its_content_version
        if known is None or known[0] != self.version:
            known = self._version_and_its_content_version = (self.version, self._find_content_version())
        return known[1]

    @property
    def content_identity(self) -> str:
        """Changes whenever the rows change, also when the table was removed and made again."""
        return f"{self._delta.metadata().id}:{self.content_version}"

    def present_files(self) -> dict[str, int]:
        """Parquet files that lie under the table, by path, with their sizes in bytes."""
        fs, root = filesystem(self.uri, self.options)
        found = fs.find(root, detail=True)
        return {
            path[len(root.rstrip("/")) + 1 :]: entry["size"]
            for path, entry in found.items()
            if path.endswith(".parquet") and "/_delta_log/" not in path
        }

    def missing_file(self) -> str:
        """A file that the log names and that is gone or has another size, in words; empty when there is none."""
        present = self.present_files()
        for path, file in self.files().items():
            if path not in present:
                return f"{self.uri}/{path} is missing"
            if present[path] != file.size:
                return f"{self.uri}/{path} has {present[path]} bytes, and its log says {file.size}"
        return ""

    def _find_content_version(self) -> int:
        for version in range(self.version, 0, -1):
            entries = self._log_entries(version)
            carried = [entry["commitInfo"].get(CONTENT_VERSION_KEY) for entry in entries if "commitInfo" in entry]
            if any(carried):
                return int(carried[0])
            files = [entry.get("add") or entry.get("remove") for entry in entries]
            if not entries or any(file["dataChange"] for file in files if file):
                return version
        return 0

    def refresh(self) -> None:
        """See what others committed."""
        repeated(self._delta.update_incremental, self.uri)

    def files(self) -> dict[str, DataFile]:
        """The files of the current version, by path. Their names and key ranges, nothing is read from them."""
        actions = pa.table(self._delta.get_add_actions(flatten=True))
        columns = [actions[name].to_pylist() for name in ("path", "size_bytes", "num_records")]
        ranges = [
            actions[name].to_pylist() if name in actions.column_names else [""] * len(actions)
            for name in (f"min.{self.key}", f"max.{self.key}")
        ]
        return {
            path: DataFile(path, size, rows or 0, "" if low is None else low, "" if high is None else high)
            for path, size, rows, low, high in zip(*columns, *ranges, strict=True)
        }

    def _log_entries(self, version: int) -> list[dict[str, Any]]:
        """What the log says of a commit; nothing where it was cleaned up behind a checkpoint."""
        fs, path = filesystem(join(self.uri, "_delta_log", f"{version:020}.json"), self.options)
        try:
            return [json.loads(line) for line in fs.cat_file(path).splitlines() if line.strip()]
        except FileNotFoundError:
            return []

    def write_file(self, name: str, rows: pa.Table) -> DataFile:
        """Write rows (whole images, in key order) as a file of this table; it shows only once committed."""
        return write_parquet(self.uri, name, rows, self.options)

    def read_file(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Raises MissingFile for one that is gone, DamagedFile for one that cannot be read."""
        with open_parquet(self.place(name), self.options) as parquet:
            return parquet.read(columns)

    def has_file(self, name: str) -> bool:
        return is_there(self.place(name), self.options)

    def described(self, name: str) -> DataFile | None:
        """A file of this table that the log does not name, by its footer; None for one that is gone, damaged or empty.

        Raises JobError for a name that leads out of the table.
        """
        self.place(name)
        return described(self.uri, name, self.options)

    def place(self, name: str) -> str:
        """Where a file of this table is. Raises JobError for a name, of a row or of the log, that leads elsewhere."""
        if name.startswith("/") or "://" in name or ".." in name.split("/"):
            raise JobError(
                f"{self.uri} names {name!r} as its file, which lies outside: the store is not to be trusted."
            )
        return join(self.uri, name)

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of every row, in no particular order."""
        schema = pa.schema([self.schema.field(name) for name in columns])
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            found = list(pool.map(lambda name: self.read_file(name, columns).cast(schema), self.files()))
        return pa.concat_tables([schema.empty_table(), *found])

    def rows_with_ids(self, ids: Iterable[str], columns: list[str]) -> pa.Table:
        """Rows of the given images, with the file each lies in as column `file`; files out of range stay closed."""
        wanted = sorted(ids)
        value_set = pa.array(wanted, pa.string())
        schema = pa.schema([*(self.schema.field(name) for name in columns), pa.field("file", pa.string())])
        found = [schema.empty_table()]
        for path, file in self.files().items():
            if wanted and file.may_hold(wanted):
                rows = self.read_file(path, columns)
                rows = rows.filter(pc.is_in(rows["image_id"], value_set=value_set))
                found.append(rows.append_column("file", pa.array([path] * len(rows), pa.string())).cast(schema))
        return pa.concat_tables(found)
