"""Whether the files of a table are there, can be read, and are those that logs say."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import counted
from pipelines.storage.errors import explain_read_error, reaching
from pipelines.storage.files import filesystem, join
from pipelines.store.changes import Transaction
from pipelines.store.damage import DamagedLog
from pipelines.store.findings import Finding, RemoveFile, RestoreFile
from pipelines.store.parquet import DamagedFile, DataFile, described, open_parquet, why_unreadable
from pipelines.store.snapshots import Snapshot
from pipelines.store.table import Table

FILES_READ_AT_ONCE = 4

_T = TypeVar("_T")


def read_or_why(uri: str, read: Callable[[], _T]) -> tuple[_T | None, str]:
    """What `read` makes of a file, or why the file is damaged.

    Raises JobError for a file that cannot be reached or may not be read: nobody can say then whether it is damaged.
    """
    try:
        return read(), ""
    except FileNotFoundError:
        return None, "it is gone"
    except (DamagedFile, pa.ArrowException) as error:
        return None, why_unreadable(error)
    except OSError as error:
        raise explain_read_error(error, uri) or error from None


def check_files(path: str, table: Table, *, deep: bool) -> Iterator[Finding]:
    """Whether the files of a table and its log agree. deep: every page is read and compared with its checksum.

    Raises JobError as `read_or_why` does.
    """
    files, present = table.files(), table.present_files()
    for file in sorted(files.keys() - present.keys()):
        yield _finding(path, file, "is in the log, but the file is missing")
    for file, said in files.items():
        if present.get(file, said.size) != said.size:
            yield _finding(path, file, f"has {present[file]} bytes, the log says {said.size}")
    there = [said for file, said in files.items() if file in present]
    expected = _columns(_schema_as_parquet(table.schema))
    for said in there:
        yield from _check_footer(path, table, said, expected)
    if deep:
        with ThreadPoolExecutor(FILES_READ_AT_ONCE) as pool:
            yield from filter(None, pool.map(lambda said: _check_pages(path, table, said), there))


def _finding(path: str, file: str, what: str) -> Finding:
    return Finding("file", path, f"{path}: {file} {what}", RemoveFile(path, file))


def _check_footer(path: str, table: Table, file: DataFile, expected: list[str]) -> Iterator[Finding]:
    """Whether the footer of a file can be read, and says what the log and the spec do."""
    uri = table.place(file.path)

    def read() -> pq.FileMetaData:
        with open_parquet(uri, table.options) as parquet:
            return parquet.metadata

    footer, why = read_or_why(uri, read)
    if footer is None:
        yield _finding(path, file.path, f"cannot be read as Parquet ({why})")
        return
    if footer.num_rows != file.rows:
        yield _finding(path, file.path, f"has {counted(footer.num_rows, 'row')}, the log says {file.rows:,}")
    columns = _columns(footer)
    if columns != expected:
        differing = ", ".join(sorted({*columns, *expected} - {*columns}.intersection(expected)))
        yield _finding(path, file.path, f"has other columns than the store's spec ({differing})")
        return
    low, high = _key_range(footer) or (file.min_id, file.max_id)
    if not _is_within(low, high, file):
        # readers skip files by this range
        said = f"the log says {file.min_id!r} to {file.max_id!r}"
        yield _finding(path, file.path, f"has keys {low!r} to {high!r}, {said}")


def _is_within(low: Any, high: Any, file: DataFile) -> bool:
    """Whether a range of keys lies within that of the log, which has another type where the log is damaged."""
    bounds: list[Any] = [file.min_id, low, high, file.max_id]
    return len({type(one) for one in bounds}) == 1 and bounds == sorted(bounds)


def _check_pages(path: str, table: Table, file: DataFile) -> Finding | None:
    """A file of which a page is not what was written; one without a footer is told of elsewhere."""
    uri = table.place(file.path)

    def read() -> bool:
        with open_parquet(uri, table.options) as parquet:
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group)
        return True

    read_whole, why = read_or_why(uri, read)
    return None if read_whole else _finding(path, file.path, f"is damaged ({why})")


def _schema_as_parquet(schema: pa.Schema) -> pq.FileMetaData:
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer)
    return pq.ParquetFile(buffer).metadata


def _columns(footer: pq.FileMetaData) -> list[str]:
    """Columns of a file with the type of their values, however lists are spelt."""
    leaves = [footer.schema.column(index) for index in range(footer.num_columns)]
    return [f"{leaf.path.partition('.')[0]} {leaf.physical_type}" for leaf in leaves]


def _key_range(footer: pq.FileMetaData) -> tuple[str, str] | None:
    """Smallest and largest key, from the statistics of the row groups; None for a file without rows."""
    statistics = [footer.row_group(index).column(0).statistics for index in range(footer.num_row_groups)]
    known = [one for one in statistics if one is not None and one.has_min_max]
    return (min(one.min for one in known), max(one.max for one in known)) if known else None


def check_against_transactions(current: Snapshot, tables: dict[str, Table]) -> Iterator[Finding]:
    """Whether tables have the files that the transactions brought which are still in the store's log, and none that
    they took away. It is the only check that finds a log of a table in which the name of a file is another one.

    Files that the table's log says were taken away are passed over: another program did it, or put them back.

    Raises JobError for a transaction that cannot be reached; damaged ones are passed over.
    """
    last_word: dict[tuple[str, str], DataFile | None] = {}
    for transaction in _transactions(current):
        for entry in transaction.tables:
            if entry.schema:  # the table was made by it, perhaps again
                last_word = {one: said for one, said in last_word.items() if one[0] != entry.table}
            last_word |= {(entry.table, path): None for path in entry.remove}
            last_word |= {(entry.table, file.path): file for file in entry.add}
    for (path, file), said in sorted(last_word.items(), key=lambda one: one[0]):
        if path not in tables:
            continue
        table = tables[path]
        if (said is None) != (file in table.files()) or file in _files_taken_away(current, path):
            continue
        if said is None:
            yield _finding(path, file, "was removed by a transaction, and the table's log has it still")
        elif described(table.uri, file, table.options) == said:
            sentence = f"{path}: {file} was added by a transaction, and the table's log does not have it"
            yield Finding("file", path, sentence, RestoreFile(path, said))


def _files_taken_away(current: Snapshot, table: str) -> set[str]:
    """Files that commits to a table took away, as its log has it; what cannot be read there says nothing."""
    folder = join(current.log.uri, table, "_delta_log")
    fs, path = filesystem(folder, current.log.options)
    found = set[str]()
    with reaching(folder):
        for name in fs.ls(path, detail=False):
            for line in fs.cat_file(name).splitlines() if name.endswith(".json") else ():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    found.add(str(json.loads(line)["remove"]["path"]))
    return found


def _transactions(current: Snapshot) -> Iterator[Transaction]:
    for number in current.log.listing().numbers:
        if number <= current.number:
            try:
                found = current.log.read(number)
            except DamagedLog:
                continue
            if found:
                yield found
