"""Results of two tables, of which the leading one says what is done and names, row by row, the file of the other.

Both change in one transaction, which is decided on what the store holds at that moment: rows that another run made
first are dropped, those of images that were extracted again meanwhile are not taken up, and older rows are replaced in
the files that hold them then.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.results.extracted_images import ExtractedImages
from pipelines.results.stored import ResultTables
from pipelines.store.changes import Change, TableChange
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.parquet import DataFile
from pipelines.store.rewriting import rewrite
from pipelines.store.snapshots import Snapshot
from pipelines.store.table import READS_AT_ONCE
from pipelines.store.transactions import Build, transact
from pipelines.store.written_files import WrittenFiles

_Report = TypeVar("_Report")


@dataclass
class _Edits:
    """Files that come and go, in both tables."""

    add: dict[str, list[DataFile]] = field(default_factory=dict)
    remove: dict[str, list[str]] = field(default_factory=dict)

    def adds(self, table: str, files: Iterable[DataFile | None]) -> None:
        self.add.setdefault(table, []).extend(file for file in files if file)

    def removes(self, table: str, paths: Iterable[str]) -> None:
        self.remove.setdefault(table, []).extend(paths)


class LinkedResult(ResultTables, Generic[_Report]):
    """The two tables of one NAME at the versions last refreshed.

    data: the table whose files are named. key_columns: of both tables, that `keys_of` takes. versioned: columns that
    make a row of the leading table another one. extractions: (image_id, run_id) columns of the images that a row is
    made from. rows_are: what the leading table has a row for. command: that changes the tables.

    changed_meanwhile: rows that the last `commit` did not take up, since their images were extracted again, or removed,
    while the run was at work.
    """

    data: ClassVar[str]
    key_columns: ClassVar[Sequence[str]]
    versioned: ClassVar[Sequence[str]]
    extractions: ClassVar[Sequence[tuple[str, str]]]
    rows_are: ClassVar[str]
    command: ClassVar[str]

    def prepare(self) -> None:
        self._seen = set(self.tables[self.leading].files())
        self._images = ExtractedImages()
        self._written = WrittenFiles()
        self.changed_meanwhile = 0

    @classmethod
    @abstractmethod
    def keys_of(cls, rows: pa.Table) -> pa.Array:
        """A string for each row of either table, the same for all rows of one thing."""

    @staticmethod
    @abstractmethod
    def files_of(report: _Report) -> tuple[DataFile | None, DataFile | None]:
        """The files that a worker wrote: of the leading table, and of the data."""

    @staticmethod
    @abstractmethod
    def rows_of(report: _Report) -> pa.Table:
        """The rows of the leading table that a worker wrote, in their order: versioned and extractions columns."""

    @abstractmethod
    def reduced(self, report: _Report, gone: pa.Array, leading: DataFile | None, data: DataFile | None) -> _Report:
        """A report without the rows of some keys, which copies of its files do not have."""

    def linked_tables(self) -> Iterator[LinkedTables]:
        yield LinkedTables(self.tables[self.data], self.tables[self.leading])
        yield LinkedTables(self.tables[self.leading])

    def repair(self, run_id: str) -> dict[str, int]:
        """Mend what runs of an older dinoray left, which were killed between their commits to the two tables.

        The leading table decides what is true: files of data that it does not name go; those that it names and the log
        lost come back, while they are there; rows whose data is gone go, to be made again.
        """
        found: dict[str, int] = {}

        def build(current: Snapshot) -> Change | None:
            leading, data = current.files(self.path_of(self.leading)), current.files(self.path_of(self.data))
            named = {path: _shards(rows) for path, rows in self._read(leading, ["shard"]).items()}
            lost = set[str]().union(*named.values()) - data.keys()
            orphans = data.keys() - set[str]().union(*named.values())
            restored = [file for shard in sorted(lost) if (file := self.tables[self.data].described(shard))]
            gone = lost.difference(file.path for file in restored)
            hits = self._leading_rows([path for path, shards in named.items() if shards & gone])
            value_set = pa.array(sorted(gone), pa.string())
            hits = {path: rows.filter(pc.is_in(rows["shard"], value_set=value_set)) for path, rows in hits.items()}
            found["orphans_removed"] = len(orphans)
            found["shards_restored"] = len(restored)
            found[f"{self.rows_are}_lost"] = sum(map(len, hits.values()))
            edits = self._without(current, hits, run_id)
            edits.removes(self.data, sorted(orphans))
            edits.adds(self.data, restored)
            return self._change(edits)

        self._transact(build, run_id)
        self._seen = set(self.tables[self.leading].files())
        return found

    def drop(self, rows: pa.Table, run_id: str, *, planned_on: int | None = None) -> int | None:
        """Remove rows of the leading table and what belongs to them. Returns how many were removed.

        rows: their versioned columns; the same things in other versions, which another run may have added meanwhile,
        stay. planned_on: version of the store's images that these rows were found outdated by; where it has another one
        now, nothing is removed, and None is returned: look again.
        """
        unwanted = _joined(rows, self.versioned)

        def find(current: Snapshot) -> dict[str, pa.Table] | None:
            if planned_on is not None and current.version("images") != planned_on:
                return None
            return self._hits(current, lambda held: pc.is_in(_joined(held, self.versioned), value_set=unwanted))

        return self._drop(find, run_id) if len(unwanted) else 0

    def drop_outdated(self, run_id: str) -> int:
        """Remove rows of images that were extracted again, or are gone. Returns how many were removed."""
        removed = self._drop(
            lambda current: self._hits(current, lambda held: pa.array(~self.are_current(current, held))), run_id
        )
        assert removed is not None
        return removed

    def _drop(self, find: Callable[[Snapshot], dict[str, pa.Table] | None], run_id: str) -> int | None:
        """Remove rows that `find` names in a snapshot, by file of the leading table; how many, or None where it says
        None."""
        found: list[tuple[dict[str, pa.Table] | None, _Edits]] = []

        def build(current: Snapshot) -> Change | None:
            hits = find(current)
            found[:] = [(hits, self._without(current, hits or {}, run_id))]
            return self._change(found[0][1])

        self._transact(build, run_id)
        ((hits, edits),) = found
        if self._seen.issuperset(edits.remove.get(self.leading, ())):
            self._seen |= {file.path for file in edits.add.get(self.leading, ())}
        return None if hits is None else sum(map(len, hits.values()))

    def commit(self, reports: Iterable[_Report], run_id: str) -> list[_Report]:
        """Make files of workers visible. Returns what became visible.

        Left out is what another run did first, and what was made from extractions that the store no longer has.
        """
        reports = [report for report in reports if self.files_of(report)[0]]
        rows = pa.concat_tables([self.rows_of(report) for report in reports]) if reports else None
        left: list[_Report] = []

        def build(current: Snapshot) -> Change | None:
            left.clear()
            self.changed_meanwhile = 0
            if rows is None:
                return None
            keys = self.keys_of(rows)
            ours_current = self.are_current(current, rows)
            there = self._rows_elsewhere(current, keys)
            done, replaced = self._done_and_outdated(current, there)
            is_done = np.asarray(pc.is_in(keys, value_set=done))
            self.changed_meanwhile = int((~ours_current & ~is_done).sum())
            gone = keys.filter(pa.array(~ours_current | is_done))
            left.extend(kept for report in reports if (kept := self._reduce(report, gone, run_id)))
            taken = pa.concat_arrays([_NOTHING, *(self.keys_of(self.rows_of(report)) for report in left)])
            hits = {path: held.filter(pc.is_in(self.keys_of(held), value_set=taken)) for path, held in replaced.items()}
            edits = self._without(current, {path: held for path, held in hits.items() if len(held)}, run_id)
            for report in left:
                leading, data = self.files_of(report)
                edits.adds(self.data, [data])
                edits.adds(self.leading, [leading])
            return self._change(edits)

        self._transact(build, run_id)
        # of other runs' rows, copies of their files were not among what this run's plan saw
        self._seen |= {file.path for report in left if (file := self.files_of(report)[0])}
        return left

    # What a change is decided by

    def are_current(self, current: Snapshot, rows: pa.Table) -> np.ndarray:
        """(n,) bool: whether rows of the leading table were made from what the store holds."""
        return self._images.are_current(current, rows, self.extractions)

    def _rows_elsewhere(self, current: Snapshot, wanted: pa.Array) -> dict[str, pa.Table]:
        """Rows with some keys in files that this run's plan did not see, by file."""
        unseen = current.files(self.path_of(self.leading)).keys() - self._seen
        return self._those(unseen, lambda rows: pc.is_in(self.keys_of(rows), value_set=wanted))

    def _done_and_outdated(
        self, current: Snapshot, there: Mapping[str, pa.Table]
    ) -> tuple[pa.Array, dict[str, pa.Table]]:
        """(keys of rows that are there and right, the other rows by file)."""
        if not there:
            return _NOTHING, {}
        right = self.are_current(current, pa.concat_tables(there.values()))
        of_file = dict(zip(there, _split(right, there.values()), strict=True))
        done = [self.keys_of(rows.filter(pa.array(of_file[path]))) for path, rows in there.items()]
        return pa.concat_arrays(done), {path: rows.filter(pa.array(~of_file[path])) for path, rows in there.items()}

    def _reduce(self, report: _Report, gone: pa.Array, run_id: str) -> _Report | None:
        """A report without some keys; None when nothing is left of it."""
        rows = self.rows_of(report)
        of_report = pc.is_in(self.keys_of(rows), value_set=gone)
        if not pc.any(of_report).as_py():
            return report
        if pc.all(of_report).as_py():
            return None
        leading, data = self.files_of(report)
        unwanted = self.keys_of(rows.filter(of_report))
        copy = self._copy_of_data(data, unwanted, run_id) if data else None
        renamed = {data.path: copy.path if copy else None} if data else {}
        assert leading
        kept = self._copy_of_leading(leading, _joined(rows.filter(of_report), self.versioned), renamed, run_id)
        return self.reduced(report, unwanted, kept, copy)

    # What it takes to remove rows

    def _hits(self, current: Snapshot, unwanted: Callable[[pa.Table], Any]) -> dict[str, pa.Table]:
        """Rows that a condition holds for, by file of the leading table."""
        return self._those(current.files(self.path_of(self.leading)), unwanted)

    def _those(self, paths: Iterable[str], wanted: Callable[[pa.Table], Any]) -> dict[str, pa.Table]:
        """Rows of files of the leading table that a condition holds for; it is asked once, of all rows."""
        held = self._leading_rows(paths)
        if not held:
            return {}
        found = np.asarray(wanted(pa.concat_tables(held.values())))
        parts = zip(held.items(), _split(found, held.values()), strict=True)
        return {path: rows.filter(pa.array(part)) for (path, rows), part in parts if part.any()}

    def _without(self, current: Snapshot, hits: Mapping[str, pa.Table], run_id: str) -> _Edits:
        """The files that change when rows go. hits: rows by file of the leading table.

        A file of data may be named by several files of the leading table: each is written again once, and everything
        that names it follows.
        """
        edits = _Edits()
        leading, data = current.files(self.path_of(self.leading)), current.files(self.path_of(self.data))
        going: dict[str, list[str]] = {}
        for rows in hits.values():
            for shard, key in zip(rows["shard"].to_pylist(), self.keys_of(rows).to_pylist(), strict=True):
                if shard in data:
                    going.setdefault(shard, []).append(key)
        renamed: dict[str, str | None] = {}
        for shard, keys in sorted(going.items()):
            copy = self._copy_of_data(data[shard], pa.array(sorted(keys), pa.string()), run_id)
            edits.removes(self.data, [shard])
            edits.adds(self.data, [copy])
            renamed[shard] = copy.path if copy else None
        for path, file in leading.items():
            unwanted = _joined(hits[path], self.versioned) if path in hits else _NOTHING
            if path in hits or self._names(file, [data[shard] for shard in renamed]):
                edits.removes(self.leading, [path])
                edits.adds(self.leading, [self._copy_of_leading(file, unwanted, renamed, run_id)])
        return edits

    def _names(self, file: DataFile, shards: Sequence[DataFile]) -> bool:
        """Whether rows of a file of the leading table name one of some files of data."""
        near = {one.path for one in shards if one.min_id <= file.max_id and file.min_id <= one.max_id}
        return bool(near) and bool(near & _shards(self._read([file.path], ["shard"])[file.path]))

    def _copy_of_data(self, file: DataFile, gone: pa.Array, run_id: str) -> DataFile | None:
        def change(rows: pa.Table) -> pa.Table:
            return rows.filter(pc.invert(pc.is_in(self.keys_of(rows), value_set=gone)))

        return self._copy(self.data, file, (tuple(gone.to_pylist()),), change, run_id)

    def _copy_of_leading(
        self, file: DataFile, gone: pa.Array, renamed: Mapping[str, str | None], run_id: str
    ) -> DataFile | None:
        def change(rows: pa.Table) -> pa.Table:
            rows = rows.filter(pc.invert(pc.is_in(_joined(rows, self.versioned), value_set=gone)))
            shards = [renamed.get(shard, shard) for shard in rows["shard"].to_pylist()]
            return rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array(shards, pa.string()))

        return self._copy(self.leading, file, (tuple(gone.to_pylist()), *sorted(renamed.items())), change, run_id)

    def _copy(self, table: str, file: DataFile, how: tuple[Any, ...], change: Any, run_id: str) -> DataFile | None:
        """A changed copy of a file, None when no row is left; made once, however often a change is decided."""
        of_table = self.tables[table]
        return self._written.once(of_table, (file.path, how), lambda: rewrite(of_table, file, run_id, change))

    # Reading and writing

    def _leading_rows(self, paths: Iterable[str]) -> dict[str, pa.Table]:
        """What a change is decided by, of the rows of some files of the leading table, by file."""
        columns = [*self.versioned, *(run_id for _, run_id in self.extractions), "shard"]
        return self._read(paths, list(dict.fromkeys(columns)))

    def _read(self, paths: Iterable[str], columns: list[str]) -> dict[str, pa.Table]:
        """Some columns of files of the leading table, by file."""
        table, paths = self.tables[self.leading], sorted(paths)
        schema = pa.schema([table.schema.field(name) for name in columns])
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return dict(
                zip(paths, pool.map(lambda path: table.read_file(path, columns).cast(schema), paths), strict=True)
            )

    def _change(self, edits: _Edits) -> Change | None:
        """The leading table comes last; None where nothing changes."""
        tables = [
            TableChange(self.path_of(table), self.schemas[table], edits.add.get(table, ()), edits.remove.get(table, ()))
            for table in (self.data, self.leading)
        ]
        tables = [one for one in tables if one.add or one.remove]
        return Change(tables) if tables else None

    def _transact(self, build: Build, run_id: str) -> None:
        """Copies that were made for a decision and not taken up are removed."""
        self._written = WrittenFiles()
        decided: list[Change | None] = [None]

        def build_and_note(current: Snapshot) -> Change | None:
            decided[0] = build(current)
            return decided[0]

        transact(self.log, build_and_note, run_id=run_id, command=self.command)
        self._written.remove_unused(decided[0])
        self.refresh()


_NOTHING = pa.array([], pa.string())


def _shards(rows: pa.Table) -> set[str]:
    """The files of data that rows name."""
    return set(pc.unique(rows["shard"]).to_pylist()) - {None}


def _split(values: np.ndarray, tables: Iterable[pa.Table]) -> list[np.ndarray]:
    """Values of the rows of several tables, table by table."""
    return np.split(values, np.cumsum([len(rows) for rows in tables])[:-1])


def _joined(rows: pa.Table, columns: Sequence[str]) -> pa.Array:
    """One string for each row, made of some of its columns."""
    joined = pc.binary_join_element_wise(*(rows[name] for name in columns), "\0")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined
