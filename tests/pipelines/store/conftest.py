"""Stores and processes for the tests of transactions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from killable_processes import KillableProcesses

from pipelines.store import publishing, transaction_log
from pipelines.store.transaction_log import TransactionLog

if TYPE_CHECKING:
    from simulated_jobs import Place


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


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """Jobs run here, without Ray and a model."""
    # most tests of stores need no torch
    from simulated_jobs import jobs_in_process

    with jobs_in_process():
        yield


@pytest.fixture(scope="module")
def template(in_process: None, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A small store with results of every job, to be copied."""
    from simulated_jobs import Place, make_inputs, make_store

    folder = tmp_path_factory.mktemp("template")
    place = Place(str(folder / "store"), str(make_inputs(folder / "inputs")))
    make_store(place)
    return place
