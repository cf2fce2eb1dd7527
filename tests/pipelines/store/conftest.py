"""Stores and processes for the tests of transactions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from killable_processes import KillableProcesses

from pipelines.store import publishing, transaction_log
from pipelines.store.transaction_log import TransactionLog


@pytest.fixture
def log(tmp_path: Path) -> TransactionLog:
    return TransactionLog(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def processes() -> Iterator[KillableProcesses]:
    server = KillableProcesses()
    yield server
    server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (transaction_log, publishing):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0)
