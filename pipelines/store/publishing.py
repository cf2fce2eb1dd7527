"""Publishing a transaction: what it says is done to the tables, once, however many processes do it and however often.

Every table gets one commit that carries the transaction's number. A publisher reads the newest number of a table and
commits on top of the version that it read: where the number is there already nothing is left to do, and where another
commit came first it reads again. So two publishers, one that slept, and one whose answer was lost all come to the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake import Transaction as AppTransaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, PostCommitHookProperties, RemoveAction

from pipelines.errors import JobError, counted
from pipelines.storage.durable import sync_files, sync_folders
from pipelines.storage.errors import explain_write_error, reaching, said
from pipelines.storage.files import filesystem, is_there, join
from pipelines.storage.filesystems import delta_options, is_local, local_path
from pipelines.store.changes import TableEntry, Transaction
from pipelines.store.parquet import DataFile
from pipelines.store.table import CONTENT_VERSION_KEY, Table, open_delta, repeated
from pipelines.store.transaction_log import FIRST_PAUSE_SECONDS, PUTS_TRIED, TransactionLog

# The application of Delta's protocol whose numbers are those of transactions.
APP = "dinoray"
# A commit leaves one, and now and then a checkpoint and a hint to it.
NEWEST_LOG_FILES = 16
REMOVED_AT_ONCE = 16
COMMITS_BETWEEN_CHECKPOINTS = 10
# No machine starts again in less.
TORN_AFTER_SECONDS = 10.0


def publish(
    log: TransactionLog, transaction: Transaction, opened: Mapping[str, DeltaTable | None] | None = None
) -> None:
    """Do what a transaction says, unless it is done, and make it durable. Killed at any point, anybody may go on.

    opened: tables that were opened a moment ago, which saves opening them again; older ones cost a try.

    Raises:
        JobError: a table's log is damaged, or could not be written for good.
        OSError: the storage failed for good. In either case the transaction has happened, and the next writer
            completes it.
    """
    log.make_durable()  # or a power cut could leave a table with a change that the log does not know
    new: list[str] = []
    for entry in transaction.tables:
        new += _publish_table(log, transaction, entry, (opened or {}).get(entry.table))
    _sweep(log, transaction.sweep)
    _make_durable(log, new)
    log.mark_published(transaction.number)


def _make_durable(log: TransactionLog, files: Iterable[str]) -> None:
    """Have files of tables' logs on a local disk; delta-rs leaves that to the system."""
    files = list(files)
    sync_files(files)
    sync_folders({path.rpartition("/")[0] for path in files}, log.uri, log.durable_folders)


def _newest_files(log: TransactionLog, table: str) -> list[str]:
    """Newest files of a table's log: commits and checkpoints, whose names begin with their version, and
    `_last_checkpoint`, which sorts behind them; none on storage that is not local."""
    folder = join(log.uri, table, "_delta_log")
    if not is_local(folder) or not os.path.isdir(local_path(folder)):
        return []
    names = [name for name in os.listdir(local_path(folder)) if name.endswith((".json", ".parquet", "_checkpoint"))]
    return [join(folder, name) for name in sorted(names)[-NEWEST_LOG_FILES:]]


def _files_since(log: TransactionLog, table: str, version: int) -> list[str]:
    """Those of a version and later."""
    found = [path for path in _newest_files(log, table) if path.rpartition("/")[2][:20] >= f"{version:020}"]
    if any(path.endswith(".parquet") for path in found):
        return found
    return [path for path in found if path.endswith(".json")]  # `_last_checkpoint` is of a version before


def _remove_torn_files(log: TransactionLog, table: str) -> None:
    """Remove files without content from a table's log, which a power cut leaves of a commit that was on its way.

    delta-rs gives a file its name when it is whole, and what was made durable is not empty: these are of a transaction
    that is published now. `_last_checkpoint` is a hint, which may name what goes.
    """
    torn = [path for path in map(local_path, _newest_files(log, table)) if _is_torn(path)]
    for path in [*torn, *(os.path.join(os.path.dirname(path), "_last_checkpoint") for path in torn[:1])]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _is_torn(path: str) -> bool:
    """Empty, and not only just now as a folder of another machine may show it."""
    found = os.stat(path)
    return found.st_size == 0 and time.time() - found.st_mtime > TORN_AFTER_SECONDS


def delta_of(log: TransactionLog, table: str) -> DeltaTable | None:
    """A table of a store at its newest version, or None where there is none. Raises JobError for a damaged log."""
    return open_delta(join(log.uri, table), log.options)


def delta_for_writing(log: TransactionLog, table: str) -> DeltaTable | None:
    """As `delta_of`; a table that the last change through this log opened is brought up to date, which costs less."""
    delta = log.tables.get(table)
    if delta is not None:
        try:
            repeated(delta.update_incremental, join(log.uri, table))
            return delta
        except DeltaError:  # somebody removed it, or its log: whoever opens it says so
            del log.tables[table]
    delta = delta_of(log, table)
    if delta is not None:
        log.tables[table] = delta
    return delta


def complete_properties(log: TransactionLog, tables: Iterable[str]) -> None:
    """Give tables of an older dinoray the properties of new ones. Raises JobError for a damaged log."""
    for table in tables:
        delta = delta_of(log, table)
        if delta is None:
            continue
        known, wanted = delta.metadata().configuration, _properties(delta.schema().fields[0].name)
        if any(known.get(name) != value for name, value in wanted.items()):
            # another run that was first did the same, or will
            with contextlib.suppress(DeltaError):
                delta.alter.set_table_properties(wanted)
            _make_durable(log, _newest_files(log, table))  # later commits are built on it


def cut_table_logs(log: TransactionLog, tables: Iterable[str]) -> None:
    """Remove commits that checkpoints stand for and that nobody reads any more: those older than a table's
    `delta.logRetentionDuration`, 30 days where it has none. Raises JobError for a damaged log."""
    for table in tables:
        if delta := delta_of(log, table):
            with contextlib.suppress(DeltaError, OSError):  # the next time removes them
                delta.cleanup_metadata()


def number_of(delta: DeltaTable) -> int:
    """The number of the last transaction that touched a table, at the version that is open; 0 before any."""
    return delta.transaction_version(APP) or 0


def number_in(log: TransactionLog, table: str, delta: DeltaTable) -> int:
    """As `number_of`, which reads all of a table's state: here once for a version, and never for a commit of ours."""
    known = log.numbers.get(table)
    if known is None or known[0] is not delta or known[1] != delta.version():
        known = log.numbers[table] = (delta, delta.version(), number_of(delta))
    return known[2]


def files_for_writing(log: TransactionLog, table: str, delta: DeltaTable) -> Mapping[str, DataFile]:
    """The files of a table by path, at the version that is open. Those of a version that a commit of ours made are
    known from the one before."""
    known = log.files.get(table)
    if known is None or known[0] is not delta or known[1] != delta.version():
        known = log.files[table] = (delta, delta.version(), as_table(log, table, delta).files())
    return known[2]


def _note_commit(log: TransactionLog, before: DeltaTable, number: int, entry: TableEntry) -> None:
    """Know a table after a commit on top of the version that is open, without reading it again."""
    version = before.version()
    log.numbers[entry.table] = (before, version + 1, number)
    known = log.files.get(entry.table)
    if known and known[0] is before and known[1] == version:
        gone = set(entry.remove)
        files = {path: file for path, file in known[2].items() if path not in gone}
        files |= {file.path: file for file in entry.add}
        log.files[entry.table] = (before, version + 1, files)


def _publish_table(
    log: TransactionLog, transaction: Transaction, entry: TableEntry, delta: DeltaTable | None
) -> list[str]:
    """One commit to one table; files of its log that may be new."""
    uri = join(log.uri, entry.table)
    if delta is None:
        _remove_torn_files(log, entry.table)
    failures = 0
    while True:
        delta = delta or delta_of(log, entry.table) or _create(log, entry)
        if delta is None:
            return []
        if number_in(log, entry.table, delta) >= transaction.number or not (entry.add or entry.remove):
            return _newest_files(log, entry.table)
        before, delta = delta, None
        try:
            _commit(log, before, transaction, entry)
            _note_commit(log, before, transaction.number, entry)
            return _files_since(log, entry.table, 0 if entry.schema else before.version() + 1)
        except (OSError, DeltaError) as error:
            # another publisher was first, or the answer was lost, or the storage failed: the next look tells
            if explained := explain_write_error(error, uri):
                raise explained from None
            failures += 1
            if failures >= PUTS_TRIED and not _moved(log, entry.table, before.version()):
                raise JobError(
                    f"The change to {uri} is in the log of the store and could not be made in the table "
                    f"({said(error)}): run the same command again, which completes it."
                ) from None
            if not isinstance(error, CommitFailedError):
                time.sleep(FIRST_PAUSE_SECONDS * 2 ** min(failures, PUTS_TRIED))


def _moved(log: TransactionLog, table: str, version: int) -> bool:
    delta = delta_of(log, table)
    return delta is not None and delta.version() > version


def _create(log: TransactionLog, entry: TableEntry) -> DeltaTable | None:
    """A table that the transaction begins; None where its folder was removed since, by hand."""
    uri = join(log.uri, entry.table)
    if entry.schema is None or (entry.add and not is_there(join(uri, entry.add[0].path), log.options)):
        return None
    with contextlib.suppress(DeltaError):  # another publisher made it: it is opened in either case
        DeltaTable.create(
            uri,
            schema=Schema.from_json(entry.schema),
            mode="ignore",
            configuration=_properties(entry.key),
            storage_options=delta_options(uri, log.options),
            commit_properties=CommitProperties(max_commit_retries=0),
        )
    made = delta_of(log, entry.table)
    if made is None:
        raise JobError(f"The table {uri} cannot be made: check that the place can be written.")
    return made


def _properties(key: str) -> dict[str, str]:
    """What a table's log says of itself.

    Which columns have statistics: readers through Arrow would take the absent ones of other columns for bounds, and
    find no row for a condition. How often a checkpoint is written: each commit and each reader replays what came since
    the last one, which with delta-rs' own interval of a hundred took longer than everything else in a commit.
    """
    return {"delta.dataSkippingStatsColumns": key, "delta.checkpointInterval": str(COMMITS_BETWEEN_CHECKPOINTS)}


def _commit(log: TransactionLog, delta: DeltaTable, transaction: Transaction, entry: TableEntry) -> None:
    """The same commit for every publisher, on top of the version that is open and no other."""
    changes_rows = not entry.rearranges
    actions: list[Any] = []
    for file in entry.add:
        statistics = {
            "numRecords": file.rows,
            "minValues": {entry.key: file.min_id},
            "maxValues": {entry.key: file.max_id},
            "nullCount": {entry.key: 0},
        }
        actions.append(
            AddAction(file.path, file.size, {}, transaction.created_ms, changes_rows, json.dumps(statistics))
        )
    actions += [RemoveAction(path, changes_rows, transaction.created_ms) for path in entry.remove]
    about = {"run_id": transaction.run_id, "command": transaction.command, "token": transaction.token}
    if entry.rearranges:
        about[CONTENT_VERSION_KEY] = str(as_table(log, entry.table, delta).content_version)
    delta.create_write_transaction(
        actions,
        mode="append",
        schema=delta.schema(),
        partition_by=[],
        commit_properties=CommitProperties(
            # the commit goes on top of the version that was read, and of no other
            max_commit_retries=0,
            custom_metadata=about,
            app_transactions=[AppTransaction(APP, transaction.number)],
        ),
        # readers of older snapshots need the log, and a checkpoint replaces it only when it is on the disk
        post_commithook_properties=PostCommitHookProperties(cleanup_expired_logs=False),
    )


def as_table(log: TransactionLog, table: str, delta: DeltaTable, schema: pa.Schema | None = None) -> Table:
    """A Table at the version that is open. schema: as the reader wants the columns; the log's own where nobody says."""
    return Table(join(log.uri, table), schema or pa.schema(delta.schema().to_arrow()), log.options, delta)


def _sweep(log: TransactionLog, paths: Iterable[str]) -> None:
    """Remove files that nobody names. A transaction that would name one cannot be written: its number comes after
    this one's, by which time the file is gone, and it looks.

    A file that cannot be removed stays, and is said: it is in nobody's way, and the store must go on.
    """

    def remove(path: str) -> str:
        """What is wrong, or an empty text."""
        uri = join(log.uri, path)
        if is_local(uri) and os.path.realpath(os.path.dirname(local_path(uri))) != os.path.join(
            os.path.realpath(local_path(log.uri)), *path.split("/")[:-1]
        ):
            return f"{uri} lies behind a link that leads out of its folder"
        fs, place = filesystem(uri, log.options)
        try:
            with reaching(uri):
                fs.rm_file(place)
        except FileNotFoundError:
            return ""
        except (OSError, JobError) as error:
            return said(error)
        return ""

    paths = list(paths)
    if is_local(log.uri) or len(paths) < 2:
        problems = [problem for path in paths if (problem := remove(path))]
    else:
        with ThreadPoolExecutor(REMOVED_AT_ONCE) as pool:
            problems = [problem for problem in pool.map(remove, paths) if problem]
    if problems:
        log.messages.append(f"{counted(len(problems), 'unused file')} could not be removed: {problems[0]}.")
