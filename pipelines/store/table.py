"""A Delta table whose files are written by workers and committed by the driver, compare-and-set.

delta-rs does the log; this file adds what a store needs around it: file-level adds and removes in one commit that
fails when another run committed first, and reading only the files whose key range matters.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from pipelines.errors import JobError
from pipelines.storage.errors import explain_write_error, said
from pipelines.storage.files import filesystem, join, normalise
from pipelines.storage.filesystems import Options, delta_options, is_local
from pipelines.store.parquet import DataFile, MissingFile, open_parquet, write_parquet

READS_AT_ONCE = 16
# delta-rs repeats refused requests itself, but not what remote storage left half done.
REMOTE_STORAGE_TRIES = 4
FIRST_PAUSE_SECONDS = 0.2
# Commits that leave all rows as they were carry it in the log.
CONTENT_VERSION_KEY = "content_version"

_T = TypeVar("_T")


class CommitConflict(Exception):
    """Another run committed since this table was last refreshed: look at what it did, then try again."""


class Table:
    """One Delta table of a store, at the version of the last `refresh`."""

    def __init__(
        self, uri: str, schema: pa.Schema, options: Options | None = None, delta: DeltaTable | None = None
    ) -> None:
        """delta: the table, opened before, at the version that counts; without it the newest is opened, or made."""
        self.uri = normalise(uri)
        self.schema = schema
        # files are in the order of the key, and their log entries carry its range
        self.key = schema.names[0]
        self.options = options or {}
        self._storage_options = delta_options(self.uri, options)
        self._delta = self._open_or_create() if delta is None else delta
        self._version_and_its_content_version: tuple[int, int] | None = None

    def _open_or_create(self) -> DeltaTable:
        """Raises JobError for a log that cannot be read, OSError where the table cannot be written."""
        try:
            return self._read_log(lambda: DeltaTable(self.uri, storage_options=self._storage_options))
        except TableNotFoundError:
            pass
        except DeltaError as error:
            raise JobError(
                f"The log of {self.uri} is damaged or out of reach ({said(error)}): restore it, or extract into "
                "another STORE."
            ) from None
        try:
            # `ignore`: of two runs that start together one creates the table and the other opens it
            return DeltaTable.create(
                self.uri,
                schema=self.schema,
                mode="ignore",
                configuration=self._properties,
                storage_options=self._storage_options,
            )
        except (CommitFailedError, DeltaError):
            return self._read_log(lambda: DeltaTable(self.uri, storage_options=self._storage_options))

    @property
    def _properties(self) -> dict[str, str]:
        """Which columns have statistics in the log.

        Readers through Arrow would take the absent ones of other columns for bounds, and find no row for a condition.
        """
        return {"delta.dataSkippingStatsColumns": self.key}

    def complete_properties(self) -> None:
        """Give a table of an older dinoray the properties of a new one."""
        known = self._delta.metadata().configuration
        if any(known.get(name) != value for name, value in self._properties.items()):
            # another run that was first did the same, or will
            with contextlib.suppress(CommitFailedError, DeltaError):
                self._delta.alter.set_table_properties(self._properties)
            self.refresh()

    @classmethod
    def exists(cls, uri: str, options: Options | None = None) -> bool:
        return DeltaTable.is_deltatable(normalise(uri), storage_options=delta_options(uri, options))

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
        self._read_log(self._delta.update_incremental)

    def _read_log(self, read: Callable[[], _T]) -> _T:
        """Read from the log; from remote storage again when an answer broke off, which delta-rs does not repeat."""
        for attempt in range(REMOTE_STORAGE_TRIES):
            try:
                return read()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                if is_local(self.uri) or attempt == REMOTE_STORAGE_TRIES - 1:
                    raise
                time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("REMOTE_STORAGE_TRIES is at least 1")

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

    def commit(self, add: Iterable[DataFile], remove: Iterable[str], run_id: str, *, rearranges: bool = False) -> None:
        """Add and remove files in one commit on top of the version last seen; nothing to do commits nothing.

        rearranges: the files added hold the rows of those removed.

        A commit whose answer was lost may have landed all the same: the log is asked, and nothing is done twice.

        Raises:
            CommitConflict: another commit landed after that version. The table is refreshed.
            OSError, DeltaError: the storage failed; the commit did not land, or that cannot be known.
        """
        now_ms = time.time_ns() // 1_000_000
        actions: list[Any] = [self._add_action(file, now_ms, not rearranges) for file in add]
        actions += [RemoveAction(path, not rearranges, now_ms) for path in remove]
        if not actions:
            return
        commit_id = uuid.uuid4().hex
        for attempt in range(REMOTE_STORAGE_TRIES):
            before = self.version
            carried = {CONTENT_VERSION_KEY: str(self.content_version)} if rearranges else {}
            try:
                self._delta.create_write_transaction(
                    actions,
                    mode="append",
                    schema=self._delta.schema(),
                    partition_by=[],
                    commit_properties=CommitProperties(
                        max_commit_retries=0, custom_metadata={"run_id": run_id, "commit_id": commit_id, **carried}
                    ),
                )
                self.refresh()
                return
            except (OSError, DeltaError) as error:
                if explain_write_error(error, self.uri):
                    raise
                self.refresh()
                if self._has_commit(commit_id, before):
                    return
                if self.version > before:
                    raise CommitConflict(str(error)) from None
                if attempt == REMOTE_STORAGE_TRIES - 1:
                    raise
            # that version is still free: should the lost request arrive late, it or the next one lands, never both
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)

    def _has_commit(self, commit_id: str, after: int) -> bool:
        """Whether a commit is among those that came after a version."""
        return any(
            entry.get("commitInfo", {}).get("commit_id") == commit_id
            for version in range(after + 1, self.version + 1)
            for entry in self._log_entries(version)
        )

    def _log_entries(self, version: int) -> list[dict[str, Any]]:
        """What the log says of a commit; nothing where it was cleaned up behind a checkpoint."""
        fs, path = filesystem(join(self.uri, "_delta_log", f"{version:020}.json"), self.options)
        try:
            return [json.loads(line) for line in fs.cat_file(path).splitlines() if line.strip()]
        except FileNotFoundError:
            return []

    def _add_action(self, file: DataFile, now_ms: int, data_change: bool) -> AddAction:
        stats = {
            "numRecords": file.rows,
            "minValues": {self.key: file.min_id},
            "maxValues": {self.key: file.max_id},
            "nullCount": {self.key: 0},
        }
        return AddAction(file.path, file.size, {}, now_ms, data_change, json.dumps(stats))

    def write_file(self, name: str, rows: pa.Table) -> DataFile:
        """Write rows (whole images, in key order) as a file of this table; it shows only once committed."""
        return write_parquet(self.uri, name, rows, self.options)

    def read_file(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Raises MissingFile for one that is gone, DamagedFile for one that cannot be read."""
        uri = self.place(name)
        try:
            with open_parquet(uri, self.options) as parquet:
                return parquet.read(columns)
        except FileNotFoundError:
            raise MissingFile(f"{uri} is gone: run the same command again, or `dinoray verify` of the store.") from None

    def has_file(self, name: str) -> bool:
        fs, path = filesystem(self.place(name), self.options)
        try:
            # `exists` of some drivers says no whenever the storage fails
            fs.info(path)
        except FileNotFoundError:
            return False
        return True

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
