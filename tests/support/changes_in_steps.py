"""Watching a change to a store on its way: what it commits in which order, and others that are first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from deltalake import DeltaTable

from pipelines.storage.filesystems import local_path
from pipelines.store.transaction_log import TransactionLog


@contextmanager
def commits_in_order(store: str) -> Iterator[list[str]]:
    """The tables that get a commit, by their paths in a local store, one after the other."""
    committed: list[str] = []
    original = DeltaTable.create_write_transaction

    def commit(delta: DeltaTable, *arguments: Any, **named: Any) -> None:
        original(delta, *arguments, **named)
        committed.append(str(Path(local_path(delta.table_uri)).relative_to(local_path(store))))

    with mock.patch.object(DeltaTable, "create_write_transaction", commit):
        yield committed


@contextmanager
def just_before_its_put(log: TransactionLog, meanwhile: Callable[[], object]) -> Iterator[None]:
    """Have `meanwhile` called once, when a change through this log has decided everything and written every file, and
    is about to put its transaction. What it does through the log of another process comes first."""
    original, called = TransactionLog._put_once, list[int]()

    def put(one: TransactionLog, uri: str, data: bytes) -> bool:
        if one is log and not called:
            called.append(1)
            meanwhile()
        return original(one, uri, data)

    with mock.patch.object(TransactionLog, "_put_once", put):
        yield
    assert called, "nothing was put"
