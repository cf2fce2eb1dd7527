"""compact: merges the small files that many small runs leave, and removes what no snapshot needs any more.

Every group of files is merged in a transaction of its own, so that a run can be killed at any moment and be started
beside others: where another transaction changed one of the files, or of those that name them, compact gives way and
leaves them for the next time. Rows, key order, encodings and the shape of row groups stay; images name the new file of
their patches. The log says of each commit that it changed no row, so that indices and jobs stay up to date.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import counted
from pipelines.results.all_kinds import look_at_results
from pipelines.results.indices import begun_indices
from pipelines.running.interrupts import interruptible, uninterrupted
from pipelines.running.progress import StatusLine
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.changes import Change, TableChange
from pipelines.store.damage import DamagedLog
from pipelines.store.garbage import garbage
from pipelines.store.linked_tables import SMALL_FILE_SHARE_OF_TARGET, LinkedTables
from pipelines.store.parquet import DamagedFile, DataFile, MissingFile, new_file_name
from pipelines.store.publishing import complete_properties, cut_table_logs
from pipelines.store.rewriting import merge_files, rewrite
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.store.transaction_log import FOLDER
from pipelines.store.transactions import transact
from pipelines.store.written_files import remove_files

SWEEP_TRIES = 3


@dataclass
class Result(JobResult):
    """What a run of compact did, or would do.

    files_before, files_after: of the newest versions of all tables. merged: files that were merged into others.
    written: files that hold their rows now. conflicts: groups that another run changed meanwhile and that are left for
    the next time. vacuumed: files removed, which no kept snapshot names.
    """

    files_before: int = 0
    files_after: int = 0
    merged: int = 0
    written: int = 0
    bytes_written: int = 0
    conflicts: int = 0
    vacuumed: int = 0


def run(config: Config, *, store: str, dry_run: bool = False) -> Result:
    """Merge the small files of every table, and remove unused ones; settings: compact.target_mb, retention_hours.

    Raises:
        RequestError: there is no store.
        JobError: the disk is full, or the storage out of reach.
    """
    started = time.monotonic()
    opened = (Store.open if dry_run else Store.open_for_writing)(store, config)
    result = Result(new_run_id(), opened.uri)
    target, retention_hours = int(config.compact.target_mb * 1e6), config.compact.retention_hours
    if dry_run:
        tables = list(_tables(opened, result))
        result.files_before = sum(len(pair.data.files()) for pair in tables)
        current = snapshot(opened.log)
        for pair in tables:
            with _passing_over_damage(result):
                groups = _groups(opened, current, pair, target)
                result.merged += sum(len(group) for group in groups)
                result.written += len(groups)
        result.vacuumed = len(_leftovers(opened, current, tables, retention_hours))
        result.files_after = result.files_before - result.merged + result.written
        return result.ended("dry_run", started)

    report = RunReport("compact", opened.uri, config, result.run_id, {})
    with (
        recorded(report, result, started, told=opened.log.messages, fingerprint=opened.fingerprint),
        interruptible(),
        StatusLine() as line,
    ):
        current = snapshot(opened.log)
        tables = list(_tables(opened, result))
        result.files_before = sum(len(pair.data.files()) for pair in tables)
        for pair in tables:
            with _passing_over_damage(result):
                complete_properties(opened.log, [_path(opened, pair.data)])
                pair.data.refresh()
                for group in _groups(opened, current, pair, target):
                    line.show(f"merging {counted(len(group), 'file')} of {_path(opened, pair.data)}")
                    _merge(opened, pair, group, target, result)
        result.seconds["merge"] = time.monotonic() - started
        line.show("removing unused files")
        with uninterrupted():
            result.vacuumed = _remove_leftovers(opened, tables, retention_hours, result.run_id)
        opened.log.cut(retention_hours)
        cut_table_logs(opened.log, dict.fromkeys(_path(opened, table) for pair in tables for table in pair.both))
        result.seconds["vacuum"] = time.monotonic() - started - result.seconds["merge"]
        result.files_after = sum(len(pair.data.files()) for pair in tables)
        if not result.merged and not result.vacuumed:
            result.status = "unchanged"
    return result


def _tables(store: Store, result: Result) -> Iterator[LinkedTables]:
    """Every table of a store as data, once; leading tables are merged on their own after the data that they name. One
    that cannot be opened is said."""
    yield LinkedTables(store.patches, store.images)
    yield LinkedTables(store.images)
    yield LinkedTables(store.failures)
    for path, found in look_at_results(store):
        if isinstance(found, DamagedLog):
            result.messages.append(f"{path} stays as it is: {found}")
        else:
            yield from found.linked_tables()


@contextmanager
def _passing_over_damage(result: Result) -> Iterator[None]:
    """Say what cannot be read, and go on with the other tables."""
    try:
        yield
    except (DamagedFile, MissingFile) as error:
        if str(error) not in result.messages:
            result.messages.append(str(error))


def _path(store: Store, table: Table) -> str:
    """Of a table in its store, such as parts/animals/images."""
    return table.uri.removeprefix(f"{store.uri}/")


def _groups(store: Store, current: Snapshot, pair: LinkedTables, target: int) -> list[list[DataFile]]:
    """Files to merge. One that the leading table does not name, as kills left it before there were transactions, stays
    apart: rows that nobody asks for must not be mixed with those that count."""
    groups = pair.groups(target)
    if pair.leading is None or not groups:
        return groups
    named = _named(current, _path(store, pair.leading), pair.leading.schema)
    groups = [[file for file in group if file.path in named] for group in groups]
    return [group for group in groups if len(group) > 1]


def _named(current: Snapshot, leading: str, schema: pa.Schema) -> set[str]:
    """Files of data that a leading table names."""
    table = current.table(leading, schema)
    return set() if table is None else set(pc.unique(table.read(["shard"])["shard"]).to_pylist()) - {None}


def _merge(store: Store, tables: LinkedTables, group: list[DataFile], target: int, result: Result) -> None:
    """Merge a group, and have the leading table name the new file, unless another run changed any of it meanwhile."""
    data, leading, run_id = tables.data, tables.leading, result.run_id
    written: list[tuple[Table, DataFile]] = []
    naming: list[DataFile] = []
    seen = set(leading.files()) if leading else set()
    try:
        merged = merge_files(data, group, tables.new_name(group, run_id))
        written.append((data, merged))
        old = [file.path for file in group]
        changes = [TableChange(_path(store, data), data.schema, [merged], old, rearranges=True)]
        if leading:
            naming = _naming(leading, leading.files().values(), group)
            for copy in _renamed(leading, naming, dict.fromkeys(old, merged.path), target, run_id):
                written.append((leading, copy))
            copies = [file for table, file in written if table is leading]
            paths = [file.path for file in naming]
            changes.append(TableChange(_path(store, leading), leading.schema, copies, paths, rearranges=True))
    except FileNotFoundError:  # another run replaced it, and swept it away at once
        remove_files(written)
        result.conflicts += 1
        _refresh(tables)
        if all(file.path in data.files() for file in group):
            raise
        return
    except BaseException:
        remove_files(written)
        raise

    def build(current: Snapshot) -> Change | None:
        gone = any(path not in current.files(change.table) for change in changes for path in change.remove)
        if gone or (leading and _named_elsewhere(current, _path(store, leading), leading.schema, seen, group)):
            return None
        return Change([change for change in changes if change.remove])

    with uninterrupted():
        merge_made = transact(store.log, build, run_id=run_id, command="compact") is not None
        _refresh(tables)
        if not merge_made:
            result.conflicts += 1
            remove_files(written)
            return
        result.merged += len(group) + len(naming)
        result.written += len(written)
        result.bytes_written += sum(file.size for _, file in written)


def _refresh(tables: LinkedTables) -> None:
    for table in tables.both:
        table.refresh()


def _named_elsewhere(current: Snapshot, leading: str, schema: pa.Schema, seen: set[str], group: list[DataFile]) -> bool:
    """Whether a leading file that has come since names a file of a group."""
    table = current.table(leading, schema)
    new = [file for path, file in current.files(leading).items() if path not in seen]
    return bool(table and _naming(table, new, group))


def _renamed(
    leading: Table, naming: list[DataFile], renamed: dict[str, str], target: int, run_id: str
) -> Iterator[DataFile]:
    """Copies of files of the leading table that name the new file: the small ones as one, large ones each alone.

    Otherwise one file would grow with every run until it held everything.
    """
    small = [file for file in naming if file.size < SMALL_FILE_SHARE_OF_TARGET * target]
    if small:
        yield merge_files(leading, small, new_file_name(run_id), lambda rows: _rename(rows, renamed))
    for file in naming:
        if file not in small and (copy := rewrite(leading, file, run_id, lambda rows: _rename(rows, renamed))):
            yield copy


def _naming(leading: Table, files: Iterable[DataFile], group: list[DataFile]) -> list[DataFile]:
    """Those of some files of the leading table with rows that name a file of the group."""
    names = pa.array([file.path for file in group], pa.string())
    found = []
    for file in files:
        overlaps = any(one.min_id <= file.max_id and file.min_id <= one.max_id for one in group)
        if overlaps and pc.any(pc.is_in(leading.read_file(file.path, ["shard"])["shard"], value_set=names)).as_py():
            found.append(file)
    return found


def _rename(rows: pa.Table, renamed: dict[str, str]) -> pa.Table:
    shards = pa.array([renamed.get(shard, shard) for shard in rows["shard"].to_pylist()], pa.string())
    return rows.set_column(rows.schema.get_field_index("shard"), "shard", shards)


def _remove_leftovers(store: Store, tables: list[LinkedTables], retention_hours: float, run_id: str) -> int:
    """Remove files that no snapshot of the last `retention_hours` names. Returns how many."""
    leftovers: list[str] = []
    tries = 0

    def build(current: Snapshot) -> Change | None:
        nonlocal leftovers, tries
        tries += 1  # looking at every file of a large store takes longer than others need for a transaction
        leftovers = _leftovers(store, current, tables, retention_hours) if tries <= SWEEP_TRIES else []
        return Change(sweep=leftovers) if leftovers else None

    transact(store.log, build, run_id=run_id, command="compact")
    return len(leftovers)


def _leftovers(store: Store, current: Snapshot, tables: list[LinkedTables], retention_hours: float) -> list[str]:
    """Garbage in the folders of the store's own tables, of its log, and of what the log points at (models, indices).

    A file that a leading table names stays, even where the log of the data lost it: `extract` brings it back.
    """
    folders, spared = {FOLDER}, set[str]()
    for pointer in current.pointers.values():
        folders |= {path.rpartition("/")[0] for path in pointer.every_file}
    folders.update(begun := begun_indices(store, current))
    for pair in tables:
        data = _path(store, pair.data)
        if pair.leading:
            try:
                named = _named(current, _path(store, pair.leading), pair.leading.schema)
            except (DamagedFile, MissingFile):
                continue  # nobody can say which files it names
            spared |= {f"{data}/{path}" for path in named}
        folders |= {data, f"{data}/_delta_log"}
    found = garbage(current, retention_hours, begun)
    return [path for path in found if path.rpartition("/")[0] in folders and path not in spared]
