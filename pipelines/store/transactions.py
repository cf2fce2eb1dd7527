"""The one door through which a store changes: `transact`.

A change is decided against a snapshot, written to the log under the next number, and then published to the tables. The
log decides: a number is taken once, and what is written under it has happened, whatever becomes of its writer. Why no
interleaving loses a change or makes it twice is in docs/transactions.md.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import random
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from deltalake.exceptions import DeltaError

from pipelines.errors import JobError
from pipelines.storage.durable import sync_files, sync_folders
from pipelines.storage.errors import explain_failed_storage, explain_write_error, reaching
from pipelines.storage.files import filesystem, join
from pipelines.storage.filesystems import is_local
from pipelines.store.changes import Change, TableChange, TableEntry, Transaction, checked_path, table_entry
from pipelines.store.damage import gone
from pipelines.store.publishing import publish
from pipelines.store.snapshots import Snapshot
from pipelines.store.transaction_log import TransactionLog

LOOKS_AT_ONCE = 16
# So that a listing of the log stays short where nobody compacts.
CUT_EVERY_TRANSACTIONS = 100
LONGEST_PAUSE_SECONDS = 1.0

Build = Callable[[Snapshot], Change | None]


def transact(log: TransactionLog, build: Build, *, run_id: str, command: str) -> int | None:
    """Make one change to a store, whole or not at all; the number of its transaction, or None where nothing was asked.

    build: from what the store holds to the change, or None. It is called again with a newer snapshot whenever another
    transaction was first, so it decides everything from its argument: an image that is done elsewhere is dropped, a
    file that is gone is given way to. It should be quick; what takes long (reading, merging, computing) is done before,
    and files are written before or in it under names that nobody else uses.

    When this returns, the change is in every table and on the disk. When it raises, or the process dies, the change
    has happened or has not, and never half: the next writer completes it.

    How a process that slept is kept from taking a number that others used and cut from the log since. The log never
    loses its newest file. So if, after this process wrote number N, no file above N is there, then N was never used
    before, however long the process slept and wherever: had it been, a file above N would have been there ever since.
    If a file above N is there, then either others went on from this very transaction, or N was long past. N+1 tells,
    since it names the token of what it follows. Where it was cut from the log too, nobody can say, and this raises.
    All this is decided by names and tokens. No clock takes part: not in a machine that is suspended, not in one that is
    restored from an image, not in one whose clock is wrong.

    Raises:
        JobError: a file that the change brings, or that `build` reads, is gone; the disk is full; a log is damaged or
            out of reach.
        ValueError: `build` removes a file that its snapshot does not have, or adds one that it has.
    """
    others_were_first = 0
    while True:
        try:
            current = open_for_writing(log)
            try:
                change = build(current)
            except FileNotFoundError as error:
                if log.listing().newest > current.number:
                    continue  # another transaction replaced a file that is read here, and it was swept at once
                if isinstance(error, JobError):
                    raise
                raise JobError(gone(str(error.filename or f"A file of {log.uri}"), log.uri)) from None
            if change is None:
                return None
            transaction = _plan(current, change, run_id, command)
            _look_at_files(log, transaction, change)
            _make_files_durable(log, transaction, change)
            if log.put(transaction) and _is_in_force(current, transaction):
                return transaction.number
        except (OSError, DeltaError) as error:
            explained = explain_write_error(error, log.uri) or explain_failed_storage(error, log.uri)
            raise explained or error from None
        others_were_first += 1
        time.sleep(random.uniform(0, min(LONGEST_PAUSE_SECONDS, 0.002 * 2**others_were_first)))


def open_for_writing(log: TransactionLog) -> Snapshot:
    """The store after its newest transaction, which is published first where a dead process left it.

    Nothing is written to a store that is well.
    """
    transaction, published = log.newest()
    if transaction and not published:
        publish(log, transaction)
    return Snapshot(log, transaction, for_writing=True)


def _is_in_force(current: Snapshot, transaction: Transaction) -> bool:
    """Publish a transaction that was just written, unless its number is long past (see `transact`)."""
    log, number = current.log, transaction.number
    listing = log.listing()
    if listing.newest > number:
        following = log.read(number + 1)
        if following is None:
            raise JobError(
                f"This run slept for longer than the log of {log.uri} is kept, and there is no way to know whether its "
                "last change was made: run the same command again, which finds what is done."
            )
        if following.previous != transaction.token:
            log.take_back(number)
            return False
        return True  # others have published it, or they could not have gone on
    publish(log, transaction, current.opened)
    if number % CUT_EVERY_TRANSACTIONS == 0:
        with contextlib.suppress(OSError, JobError):  # the change is made; the next hundredth cuts more
            log.cut()
    return True


def _plan(current: Snapshot, change: Change, run_id: str, command: str) -> Transaction:
    before = current.transaction
    pointers = dict(current.pointers)
    for name, pointer in change.pointers.items():
        if pointer is None:
            pointers.pop(name, None)
        else:
            pointers[name] = pointer
    created = dt.datetime.fromtimestamp(current.log.clock(), dt.UTC)
    entries = _entries(current, change.tables)
    changed = dict(before.changed) if before else {}
    changed |= {entry.table: current.number + 1 if entry.add or entry.remove else 0 for entry in entries}
    return Transaction(
        number=current.number + 1,
        token=uuid.uuid4().hex,
        previous=before.token if before else "",
        run_id=run_id,
        command=command,
        created_at=created.isoformat(timespec="milliseconds"),
        tables=tuple(entries),
        pointers=pointers,
        sweep=tuple(checked_path(path) for path in change.sweep),
        changed=changed,
    )


def _entries(current: Snapshot, changes: Sequence[TableChange]) -> list[TableEntry]:
    """Raises ValueError for a change that does not fit the snapshot that it was made from."""
    if len({change.table for change in changes}) < len(changes):
        raise ValueError("a change names a table twice")
    for change in changes:
        here = current.files(change.table)
        coming = [file.path for file in change.add]
        if missing := [path for path in change.remove if path not in here]:
            raise ValueError(f"a change removes {missing[0]} from {change.table}, which does not have it")
        if double := [path for path in coming if path in here]:
            raise ValueError(f"a change adds {double[0]} to {change.table}, which has it already")
        if len(set(coming)) < len(coming) or len(set(change.remove)) < len(change.remove):
            raise ValueError(f"a change to {change.table} names a file twice")
    return [table_entry(change, exists=current.version(change.table) is not None) for change in changes]


def _look_at_files(log: TransactionLog, transaction: Transaction, change: Change) -> None:
    """Every file that comes must be there, whole. Files that nobody named may have been swept away, by a transaction
    before this one, so whoever looks now cannot be overtaken: the sweep would take this one's number.

    Raises JobError.
    """
    wanted: list[tuple[str, int | None]] = [
        (f"{entry.table}/{checked_path(file.path)}", file.size) for entry in transaction.tables for file in entry.add
    ]
    wanted += [(path, None) for path in _pointed_at(change)]

    def look(path: str, size: int | None) -> None:
        uri = join(log.uri, path)
        fs, place = filesystem(uri, log.options)
        try:
            with reaching(uri):
                found = fs.info(place)["size"]
        except FileNotFoundError:
            raise JobError(
                f"{uri} was written by this run and is gone: it was removed as a leftover, being older than "
                "compact.retention_hours, or by hand. Run the same command again."
            ) from None
        if size is not None and found != size:
            raise JobError(f"{uri} has {found} bytes where {size} were written: run the same command again.")

    if is_local(log.uri) or len(wanted) < 2:
        for path, size in wanted:
            look(path, size)
        return
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        list(pool.map(lambda one: look(*one), wanted))


def _make_files_durable(log: TransactionLog, transaction: Transaction, change: Change) -> None:
    """Before a transaction says that files come, they are on the disk, and so are their names."""
    if not is_local(log.uri):
        return
    coming = [f"{entry.table}/{file.path}" for entry in transaction.tables for file in entry.add]
    coming += _pointed_at(change)
    uris = [join(log.uri, path) for path in coming]
    sync_files(uris)
    sync_folders({uri.rpartition("/")[0] for uri in uris}, log.uri, log.durable_folders)


def _pointed_at(change: Change) -> list[str]:
    pointers = [pointer for pointer in change.pointers.values() if pointer]
    return [checked_path(path) for pointer in pointers for path in pointer.every_file]
