"""The same on a real S3 server: put-if-absent, kills at every step, a race, garbage."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from killable_processes import KillableProcesses
from kills_pauses_and_races import kill_everywhere, race
from s3_server import BUCKET, S3Server
from two_table_store import (
    SCHEMA,
    aged,
    compact,
    holds,
    put_images,
    sweep,
    with_old_images,
    write,
)

from pipelines.errors import JobError
from pipelines.storage import conditional
from pipelines.store import transaction_log
from pipelines.store.changes import Change, TableChange
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import transact


@pytest.fixture
def bucket_log(s3: S3Server) -> TransactionLog:
    return TransactionLog(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3.options)


def test_a_bucket_has_put_if_absent_and_lost_answers_are_told(
    bucket_log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(bucket_log, {"a": 0, "b": 0})
    monkeypatch.setattr(transaction_log, "FIRST_PAUSE_SECONDS", 0)
    original, lost = conditional.put_if_absent, list[str]()

    def put(uri: str, data: bytes, options: Any = None) -> bool:
        landed = original(uri, data, options)
        if not lost:
            lost.append(uri)
            raise TimeoutError("the storage did not answer")
        return landed

    monkeypatch.setattr(transaction_log, "put_if_absent", put)
    assert put_images(bucket_log, {"a": 1}) == 2
    holds(bucket_log, {"a": 1, "b": 0})
    assert lost and bucket_log.messages == []
    with pytest.raises(JobError, match="is gone"):
        file = write(bucket_log, "images", {"x": 0})
        fs, path = transaction_log.filesystem(f"{bucket_log.uri}/images/{file.path}", bucket_log.options)
        fs.rm_file(path)
        change = Change([TableChange("images", SCHEMA, [file])])
        transact(bucket_log, lambda _: change, run_id="r", command="c")


@pytest.mark.slow
def test_killed_at_every_step_in_a_bucket(processes: KillableProcesses, s3: S3Server) -> None:
    def new_store() -> TransactionLog:
        return with_old_images(TransactionLog(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3.options))

    kill_everywhere(processes, new_store, "new, replaced and copied rows", least=8)


def test_two_processes_race_in_a_bucket(processes: KillableProcesses, s3: S3Server) -> None:
    race(processes, f"s3://{BUCKET}", s3.options, 6)


def test_garbage_and_cuts_in_a_bucket(bucket_log: TransactionLog) -> None:
    put_images(bucket_log, {"a": 0})
    put_images(bucket_log, {"b": 0})
    compact(bucket_log)
    late = aged(bucket_log, 8)
    assert len(sweep(late, 168)) == 4
    assert late.cut() == [1, 2]
    put_images(bucket_log, {"c": 0})
    holds(bucket_log, {"a": 0, "b": 0, "c": 0})
