"""The log of a store: one small file a transaction, its number its name, written with put-if-absent.

    transactions/00000000000000000012.json        transaction 12 has happened
    transactions/00000000000000000012.published   every table has it, durably: nothing is left to do

The newest file counts. Only it may be unpublished, since a number is written after the one before is published.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deltalake import DeltaTable

from pipelines.errors import JobError
from pipelines.storage.conditional import honours_put_if_absent, put_if_absent, write_unless_there
from pipelines.storage.durable import sync_folders
from pipelines.storage.errors import explain_write_error, reaching
from pipelines.storage.files import filesystem, join, normalise
from pipelines.storage.filesystems import Options, is_local, modified_at
from pipelines.store.changes import Transaction
from pipelines.store.damage import DamagedLog, gone, run_repair
from pipelines.store.parquet import DataFile

FOLDER = "transactions"
PUTS_TRIED = 4
# It doubles from try to try.
FIRST_PAUSE_SECONDS = 0.2
# Files of the log are small: they stay for an hour, whatever compact.retention_hours says.
SHORTEST_KEPT_SECONDS = 3600.0
# As compact.retention_hours has it.
RETENTION_HOURS = 168.0

FILE_NAME_DIGITS = 20


@dataclass(frozen=True)
class Listing:
    """The files of a log at one moment. modified: number -> when its file was written, by the storage's clock."""

    numbers: list[int]  # ascending
    marked: set[int]
    modified: dict[int, float] = field(default_factory=dict)

    @property
    def newest(self) -> int:
        return self.numbers[-1] if self.numbers else 0

    @property
    def published(self) -> int:
        """The highest number that is known to be published."""
        return max(self.marked.intersection(self.numbers), default=0)


@dataclass
class TransactionLog:
    """The log of the store at `uri`, for one thread at a time.

    messages: what a person should be told, each said once. clock: seconds since 1970; it dates transactions and says
    what is old enough to be removed, and no result depends on it. durable_folders: whose names are known to be on the
    disk. tables: as the last change through this log found them, to be brought up to date for the next one.
    numbers: (table, version, number of the last transaction that touched it then), where that is known. files: (table,
    version, its files by path), where those are known.
    _conditional: whether the storage honours put-if-absent; None before the first put.
    """

    uri: str
    options: Options = field(default_factory=dict)
    retention_hours: float = RETENTION_HOURS
    clock: Callable[[], float] = time.time
    messages: list[str] = field(default_factory=list)
    durable_folders: set[str] = field(default_factory=set)
    tables: dict[str, DeltaTable] = field(default_factory=dict)
    numbers: dict[str, tuple[DeltaTable, int, int]] = field(default_factory=dict)
    files: dict[str, tuple[DeltaTable, int, Mapping[str, DataFile]]] = field(default_factory=dict)
    _conditional: bool | None = None

    def __post_init__(self) -> None:
        self.uri = normalise(self.uri)
        self.folder = join(self.uri, FOLDER)

    def listing(self, *, times: bool = False) -> Listing:
        """What is there, nothing being written. times: with `modified`, which takes a look at every file."""
        files = self._files(times=times)

        def numbered(ending: str) -> dict[int, float | None]:
            names = [
                name for name in files if name[FILE_NAME_DIGITS:] == ending and name[:FILE_NAME_DIGITS].isdecimal()
            ]
            return {int(name[:FILE_NAME_DIGITS]): files[name] for name in names}

        written = numbered(".json")
        modified = {number: time for number, time in written.items() if time is not None}
        return Listing(sorted(written), set(numbered(".published")), modified)

    def _files(self, *, times: bool) -> dict[str, float | None]:
        """Names in the folder, and when each file was written, where that was asked for."""
        fs, path = filesystem(self.folder, self.options)
        try:
            if is_local(self.folder) and not times:
                # fsspec takes a hundred times as long, and every commit lists the log several times
                return dict.fromkeys(os.listdir(path))
            with reaching(self.folder):
                entries = fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: modified_at(entry) if times else None for entry in entries}

    def read(self, number: int) -> Transaction | None:
        """A transaction, or None where the log was cut beyond it. Raises JobError for a damaged file."""
        uri = self.uri_of(number)
        fs, path = filesystem(uri, self.options)
        try:
            with reaching(uri):
                data = fs.cat_file(path)
        except FileNotFoundError:
            return None
        return Transaction.from_json(data, uri)

    def newest(self) -> tuple[Transaction | None, bool]:
        """The newest transaction, and whether it is known to be published; (None, True) for a log that is empty.

        It is listed again after it was read: a file that is still the newest was never anything else, while one that
        others have gone on from may have been cut from the log, and written again by somebody who slept.
        """
        listing = self.listing()
        while listing.newest:
            found = self.read(listing.newest)
            again = self.listing()
            self._refuse_lost_end(listing, again)
            if found and again.newest == found.number:
                return found, found.number in again.marked
            listing = again
        return None, True

    def _refuse_lost_end(self, listing: Listing, again: Listing) -> None:
        """Raises DamagedLog where the newest transaction was published and its file is gone: its number would be used
        again. A mark may show before its file does, so both of two listings have to say so."""
        newest = max(again.marked, default=0)
        if listing.newest == again.newest < newest:
            raise DamagedLog(gone(self.uri_of(newest), self.uri))

    def published(self) -> Transaction | None:
        """The newest transaction that is known to be published, for readers; None for the store as it was before any.

        The one before the newest, where that one is still on its way: nobody was told yet that it is done.
        """
        listing = self.listing()
        while listing.newest:
            number = listing.newest if listing.newest in listing.marked else listing.newest - 1
            found = self.read(number) if number else None
            again = self.listing()
            self._refuse_lost_end(listing, again)
            same = (again.newest, again.newest in again.marked) == (listing.newest, listing.newest in listing.marked)
            if same and (found or not number):
                return found
            if same:
                raise DamagedLog(
                    f"{self.uri_of(number)} is gone, and without it there is no way to know what {self.uri} holds: "
                    f"{run_repair(self.uri)}."
                )
            listing = again
        return None

    def put(self, transaction: Transaction) -> bool:
        """Write a transaction unless its number is taken; whether its file is now this one.

        An answer that is lost says nothing: the file is read, and its token tells. While there is none the same bytes
        are put again, so that it does not matter which of the requests arrives, or when.

        Raises:
            JobError: the disk is full, or may not be written.
            OSError: the storage failed for good; the transaction may have happened or not.
        """
        uri = self.uri_of(transaction.number)
        if self._conditional is None:
            self._conditional = honours_put_if_absent(self.folder, self.options)
            if not self._conditional:
                self.messages.append(
                    f"The storage of {self.uri} cannot put a file only where there is none: run only one command that "
                    "writes to this store at a time."
                )
        for attempt in range(PUTS_TRIED):
            try:
                if self._put_once(uri, transaction.to_json()):
                    return True
            except Exception as error:
                if explained := explain_write_error(error, uri):
                    raise explained from None
                if attempt == PUTS_TRIED - 1:
                    raise
            if found := self.read(transaction.number):
                return found.token == transaction.token
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise JobError(
            f"{uri} could neither be written nor read back in {PUTS_TRIED} attempts: run the same command again, which "
            "finds what is done."
        )

    def _put_once(self, uri: str, data: bytes) -> bool:
        return (put_if_absent if self._conditional else write_unless_there)(uri, data, self.options)

    def take_back(self, number: int) -> None:
        """Remove a file that was written under a number which others had used long before."""
        self._remove(self.uri_of(number))

    def mark_published(self, number: int) -> None:
        """Say that every table has a transaction. Only who made sure of that, and that it is durable, may say so."""
        uri = self.uri_of(number, "published")
        fs, path = filesystem(uri, self.options)
        with reaching(uri):
            fs.pipe_file(path, b"")
        self.make_durable()  # readers go by the mark, after a power cut too

    def make_durable(self) -> None:
        """Have the names of the log's files on the disk, whose bytes are there since they were put."""
        if is_local(self.uri):
            sync_folders([self.folder], self.uri, self.durable_folders)

    def cut(self, retention_hours: float | None = None) -> list[int]:
        """Remove files of the log that are older than the retention (and than an hour); their numbers.

        The newest published one stays in any case, as does whatever follows it, and the one that was in force when the
        retention began: what it points at was still being read then (pipelines.store.garbage).
        """
        hours = self.retention_hours if retention_hours is None else retention_hours
        listing = self.listing(times=True)
        oldest_kept = self.clock() - max(hours * 3600, SHORTEST_KEPT_SECONDS)
        before = [number for number in listing.numbers if number < listing.published]
        old = [number for number in before if listing.modified.get(number, oldest_kept) < oldest_kept]
        removed = [number for number in old if number < max(old)]
        for number in removed:
            self._remove(self.uri_of(number))
        for number in listing.marked.difference(listing.numbers).union(removed):
            if number < listing.published:
                self._remove(self.uri_of(number, "published"))
        return removed

    def uri_of(self, number: int, ending: str = "json") -> str:
        return join(self.folder, f"{number:0{FILE_NAME_DIGITS}}.{ending}")

    def _remove(self, uri: str) -> None:
        fs, path = filesystem(uri, self.options)
        with contextlib.suppress(FileNotFoundError), reaching(uri):
            fs.rm_file(path)
