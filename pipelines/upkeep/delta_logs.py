"""The log of a table, written again from the transactions that made it.

A table gets one commit for each transaction, the same whoever makes it. So where the store's log of transactions
reaches back to the making of a table, that table's log can be made again, whatever became of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines import storage
from pipelines.store.changes import Transaction
from pipelines.store.damage import DamagedLog
from pipelines.store.publishing import publish
from pipelines.store.transaction_log import TransactionLog

_LOG = "_delta_log"


def can_be_written_again(log: TransactionLog, table: str) -> bool:
    """Whether the transactions that made and changed a table are all there. table: its path in the store."""
    return bool(_history(log, table))


def write_log_again(log: TransactionLog, table: str) -> None:
    """Put the log of a table, as its transactions have it, in the place of what is left of it.

    Killed at any point, the next run writes it again. Raises DamagedLog where transactions are missing by now.
    """
    history = _history(log, table)
    if not history:
        raise DamagedLog(f"The log of {log.uri}/{table} cannot be written again: its transactions are not all there.")
    with tempfile.TemporaryDirectory(prefix="dinoray-log-") as folder:
        made = _made_in(folder, table, history)
        target = storage.join(log.uri, table, _LOG)
        fs, path = storage.filesystem(target, log.options)
        # readers begin with the hint and checkpoints, which may be what is damaged
        for name in sorted(_names_in(log, target), reverse=True):
            if name not in made:
                fs.rm_file(f"{path}/{name}")
        for name in sorted(made):
            storage.write_bytes(f"{target}/{name}", made[name], log.options)


def _history(log: TransactionLog, table: str) -> Sequence[Transaction]:
    """The transactions of a table, from that which made it to the newest that is published; none where one of them, or
    of those between, is not there."""
    listing = log.listing()
    found: list[Transaction] = []
    for number in range(listing.published, 0, -1):
        try:
            transaction = log.read(number)
        except DamagedLog:
            return []
        if transaction is None:
            return []
        entries = [entry for entry in transaction.tables if entry.table == table]
        if entries:
            found.insert(0, replace(transaction, tables=tuple(entries), sweep=()))
            if entries[0].schema:
                return found
    return []


def _made_in(folder: str, table: str, history: Sequence[Transaction]) -> dict[str, bytes]:
    """The files of a log that these transactions make, by name."""
    log = TransactionLog(folder)
    Path(log.folder).mkdir()
    for transaction in history:
        for file in transaction.tables[0].add if transaction.tables[0].schema else ():
            # a table whose first files are gone would be taken for one that was removed
            place = Path(folder, table, file.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        publish(log, transaction)
    return {one.name: one.read_bytes() for one in Path(folder, table, _LOG).iterdir() if one.is_file()}


def _names_in(log: TransactionLog, folder: str) -> list[str]:
    fs, path = storage.filesystem(folder, log.options)
    try:
        with storage.reaching(folder):
            return [str(name).rstrip("/").rpartition("/")[2] for name in fs.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
