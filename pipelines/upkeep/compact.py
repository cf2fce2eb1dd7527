"""compact: merges the small files that many small runs leave, and removes what no snapshot needs any more.

Every group of files is merged and committed on its own, compare-and-set, so that a run can be killed at any moment and
be started beside others: the first to commit wins, and compact leaves those files for the next time. Rows, key order,
encodings and the shape of row groups stay; images name the new file of their patches. The log says of each commit that
it changed no row, so that indices and jobs stay up to date.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipelines import storage
from pipelines.errors import counted
from pipelines.results.all_kinds import all_results
from pipelines.running.interrupts import interruptible, uninterrupted
from pipelines.running.progress import StatusLine
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.commit import FileChange, apply_remaining, commit_in_order
from pipelines.store.linked_tables import SMALL_FILE_SHARE_OF_TARGET, LinkedTables
from pipelines.store.parquet import DataFile, new_file_name
from pipelines.store.rewriting import merge_files, rewrite
from pipelines.store.store import Store
from pipelines.store.table import CommitConflict, Table


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
    opened = Store.open(store, config)
    result = Result(new_run_id(), opened.uri)
    tables = list(_tables(opened))
    result.files_before = sum(len(pair.data.files()) for pair in tables)
    target, retention_hours = int(config.compact.target_mb * 1e6), config.compact.retention_hours
    if dry_run:
        for pair in tables:
            groups = pair.groups(target)
            result.merged += sum(len(group) for group in groups)
            result.written += len(groups)
            result.vacuumed += len(_remove_unused(pair.data, retention_hours, dry_run=True))
        result.files_after = result.files_before - result.merged + result.written
        return result.ended("dry_run", started)

    report = RunReport("compact", opened.uri, config, result.run_id, {})
    with recorded(report, result, started, fingerprint=opened.fingerprint), interruptible(), StatusLine() as line:
        for pair in tables:
            pair.data.complete_properties()
            for group in pair.groups(target):
                line.show(f"merging {counted(len(group), 'file')} of {pair.data.uri.removeprefix(opened.uri + '/')}")
                _merge(pair, group, target, result)
        result.seconds["merge"] = time.monotonic() - started
        for pair in tables:
            line.show(f"removing unused files of {pair.data.uri.removeprefix(opened.uri + '/')}")
            result.vacuumed += len(_remove_unused(pair.data, retention_hours))
        result.seconds["vacuum"] = time.monotonic() - started - result.seconds["merge"]
        result.files_after = sum(len(pair.data.files()) for pair in tables)
        if not result.merged and not result.vacuumed:
            result.status = "unchanged"
    return result


def _tables(store: Store) -> Iterator[LinkedTables]:
    """Every table of a store as data, once; leading tables are merged on their own after the data that they name."""
    yield LinkedTables(store.patches, store.images)
    yield LinkedTables(store.images)
    yield LinkedTables(store.failures)
    for result in all_results(store):
        yield from result.linked_tables()


def _merge(tables: LinkedTables, group: list[DataFile], target: int, result: Result) -> None:
    """Merge a group, and have the leading table name the new file; on a conflict leave everything as it was."""
    data, leading, run_id = tables.data, tables.leading, result.run_id
    written: list[tuple[Table, DataFile]] = []
    try:
        merged = merge_files(data, group, tables.new_name(group, run_id))
        written.append((data, merged))
        old = [file.path for file in group]
        change = FileChange([merged], old, rearranges=True)
        if leading is None:
            with uninterrupted():
                data.commit(change.add, change.remove, run_id, rearranges=True)
        else:
            naming = _naming(leading, group)
            for copy in _renamed(leading, naming, dict.fromkeys(old, merged.path), target, run_id):
                written.append((leading, copy))
            copies = [file for table, file in written if table is leading]
            of_leading = FileChange(copies, [file.path for file in naming], rearranges=True)
            with uninterrupted():
                commit_in_order((data, change), (leading, of_leading), run_id)
                # another run's repair may have taken the new file for an orphan just before it was named
                data.refresh()
                apply_remaining(data, FileChange(add=change.add, rearranges=True), run_id)
            result.merged += len(naming)
    except CommitConflict:
        result.conflicts += 1
        for table in tables.both:
            table.refresh()
        _discard(written)
        return
    except BaseException:
        _discard(written)
        raise
    result.merged += len(group)
    result.written += len(written)
    result.bytes_written += sum(file.size for _, file in written)


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


def _naming(leading: Table, group: list[DataFile]) -> list[DataFile]:
    """Files of the leading table with rows that name a file of the group."""
    names = pa.array([file.path for file in group], pa.string())
    found = []
    for path, file in leading.files().items():
        overlaps = any(one.min_id <= file.max_id and file.min_id <= one.max_id for one in group)
        if overlaps and pc.any(pc.is_in(leading.read_file(path, ["shard"])["shard"], value_set=names)).as_py():
            found.append(file)
    return found


def _rename(rows: pa.Table, renamed: dict[str, str]) -> pa.Table:
    shards = pa.array([renamed.get(shard, shard) for shard in rows["shard"].to_pylist()], pa.string())
    return rows.set_column(rows.schema.get_field_index("shard"), "shard", shards)


def _discard(written: list[tuple[Table, DataFile]]) -> None:
    """Remove files that no log names."""
    for table, file in written:
        with contextlib.suppress(OSError):
            if file.path not in table.files():
                fs, path = storage.filesystem(storage.join(table.uri, file.path), table.options)
                fs.rm_file(path)


def _remove_unused(table: Table, retention_hours: float, *, dry_run: bool = False) -> list[str]:
    """Remove files that no snapshot of the last `retention_hours` names, unless dry_run. Returns their paths."""
    delta = DeltaTable(table.uri, storage_options=storage.delta_options(table.uri, table.options))
    return delta.vacuum(int(retention_hours), dry_run=dry_run, enforce_retention_duration=False)
