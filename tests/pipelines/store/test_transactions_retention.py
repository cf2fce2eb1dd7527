"""Sleepers, the log behind its retention, and what nobody names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from changes_in_steps import just_before_its_put
from deltalake import DeltaTable
from fsspec.implementations.local import LocalFileSystem
from tables_by_hand import made_table
from two_table_store import (
    DAY,
    SCHEMA,
    TABLES,
    aged,
    compact,
    files_in,
    fresh,
    holds,
    put_images,
    seen_by_a_reader,
    sweep,
    write,
)

from pipelines.errors import JobError
from pipelines.store.changes import Change, Pointer
from pipelines.store.garbage import garbage
from pipelines.store.snapshots import snapshot
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import open_for_writing, transact


def asleep_before_its_put(log: TransactionLog, meanwhile: Callable[[], None]) -> int | None:
    """A change that stands, everything decided, right before it writes its transaction."""
    with just_before_its_put(log, meanwhile):
        return put_images(log, {"late": 0})


def test_a_sleeper_does_not_believe_a_number_that_was_used_before(log: TransactionLog) -> None:
    def others() -> None:
        for image_id in "abc":
            put_images(fresh(log), {image_id: 0})
        assert aged(log, 8).cut() == [1]
        assert not Path(log.uri_of(1)).exists()

    assert asleep_before_its_put(log, others) == 4
    assert not Path(log.uri_of(1)).exists(), "it took back what it wrote under a number long past"
    holds(log, {"a": 0, "b": 0, "c": 0, "late": 0})


def test_a_sleeper_that_nobody_can_tell_about_says_so(log: TransactionLog) -> None:
    def others() -> None:
        for image_id in "abcd":
            put_images(fresh(log), {image_id: 0})
        assert aged(log, 8).cut() == [1, 2]

    with pytest.raises(JobError, match=r"slept for longer than the log .* is kept"):
        asleep_before_its_put(log, others)
    put_images(fresh(log), {"late": 0})  # the same command again; what the sleeper wrote has harmed nobody
    assert seen_by_a_reader(log) == {"a": 0, "b": 0, "c": 0, "d": 0, "late": 0}
    assert snapshot(log).number == 5


def test_what_a_dead_sleeper_wrote_under_an_old_number_is_not_taken_for_the_newest(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process lists the log and sleeps, others go on and cut it, another sleeper writes the number that the first
    one is about to read, and dies before it looks."""
    put_images(log, {"a": 0})
    leftover = write(log, "parts/x/images", {"x": 0})
    stale = json.loads(Path(log.uri_of(1)).read_bytes()) | {"token": "of a sleeper"}
    del stale["checksum"]
    schema = DeltaTable(f"{log.uri}/images").schema().to_json()
    files = [{"path": leftover.path, "size": leftover.size, "rows": 1, "min": "x", "max": "x"}]
    entry = {"table": "parts/x/images", "schema": schema, "key": "image_id", "add": files, "remove": []}
    Path(log.uri_of(1, "published")).unlink()  # so that its reader would publish it
    original, slept = TransactionLog.read, list[int]()

    def read(one: TransactionLog, number: int) -> Any:
        if one is log and not slept:
            slept.append(number)
            for image_id in "bcd":
                put_images(fresh(log), {image_id: 0})
            assert aged(log, 8).cut() == [1, 2]
            Path(log.uri_of(1)).write_text(json.dumps(stale | {"tables": [entry | {"rearranges": False}]}))
        return original(one, number)

    monkeypatch.setattr(TransactionLog, "read", read)
    assert put_images(log, {"e": 0}) == 5
    assert slept == [1]
    assert seen_by_a_reader(log) == {image_id: 0 for image_id in "abcde"}
    assert snapshot(log).table("parts/x/images") is None


def test_a_reader_that_slept_is_not_told_what_a_dead_sleeper_wrote(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(log, {"a": 0})
    stale = json.loads(Path(log.uri_of(1)).read_bytes())
    del stale["checksum"]
    stale["pointers"] = {"index/photos": {"file": "index/photos/never.json", "checksum": None, "files": []}}
    original, slept = TransactionLog.read, list[int]()

    def read(one: TransactionLog, number: int) -> Any:
        if one is log and not slept:
            slept.append(number)
            for image_id in "bcd":
                put_images(fresh(log), {image_id: 0})
            assert aged(log, 8).cut() == [1, 2]
            Path(log.uri_of(1)).write_text(json.dumps(stale))
        return original(one, number)

    monkeypatch.setattr(TransactionLog, "read", read)
    current = snapshot(log)
    assert slept == [1] and (current.number, dict(current.pointers)) == (4, {})


def test_a_sleeper_after_its_put_finds_that_others_went_on(log: TransactionLog) -> None:
    original = TransactionLog.put

    def put(one: TransactionLog, transaction: Any) -> bool:
        landed = original(one, transaction)
        if one is log:
            put_images(fresh(log), {"a": 0})
            put_images(fresh(log), {"b": 0})
        return landed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransactionLog, "put", put)
        assert put_images(log, {"first": 0}) == 1
    holds(log, {"a": 0, "b": 0, "first": 0})


def test_the_log_is_cut_behind_the_retention_and_never_empty(log: TransactionLog) -> None:
    for image_id in "abcd":
        put_images(log, {image_id: 0})
    assert log.cut(0) == [], "files of the log stay for an hour in any case"
    assert aged(log, 8).cut(24 * 9) == []
    assert aged(log, 8).cut() == [1, 2]
    assert sorted(path.name[18:] for path in Path(log.folder).iterdir()) == [
        f"{number:02}.{kind}" for number in (3, 4) for kind in ("json", "published")
    ]
    assert aged(log, 80).cut() == []
    put_images(log, {"e": 0})
    holds(log, {image_id: 0 for image_id in "abcde"})


def test_a_transaction_that_is_not_published_keeps_the_one_before(log: TransactionLog) -> None:
    for image_id in "abcd":
        put_images(log, {image_id: 0})
    Path(log.uri_of(4, "published")).unlink()
    assert aged(log, 8).cut() == [1], "2 was in force when the retention began, readers are at 3"
    assert seen_by_a_reader(log) == {"a": 0, "b": 0, "c": 0} and snapshot(log).number == 3


def test_a_long_log_is_cut_by_the_way(log: TransactionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.store.transactions.CUT_EVERY_TRANSACTIONS", 5)
    late = aged(log, 8)
    for at in range(5):
        put_images(late, {str(at): 0})
    assert late.listing().numbers == [4, 5]


def test_garbage_is_what_nobody_names_once_it_is_old(log: TransactionLog) -> None:
    put_images(log, {"a": 0, "b": 0})
    put_images(log, {"c": 0})
    replaced = {f"{table}/{path}" for table in TABLES for path in snapshot(log).files(table)}
    compact(log)
    leftover = f"images/{write(log, 'images', {'x': 0}).path}"
    (Path(log.folder) / "00000000000000000009.json.abc.partial").write_text("a killed writer's")
    (Path(log.uri) / "images" / "notes.txt").write_text("not ours")
    partial = "transactions/00000000000000000009.json.abc.partial"
    staged = f"images/_delta_log/{9:020}.json#1"
    Path(log.uri, staged).write_text("a killed writer's")
    written = [os.stat(path).st_mtime for path in files_in(log)]
    young = TransactionLog(log.uri, clock=lambda: min(written) + 7200)
    assert garbage(open_for_writing(young), 2) == [], "none of it is older than two hours"
    late = TransactionLog(log.uri, clock=lambda: max(written) + 7201)
    assert set(garbage(open_for_writing(late), 2)) == replaced | {leftover, partial, staged}
    sweep(late, 2)
    assert not any(Path(log.uri, path).exists() for path in replaced | {leftover, partial})
    assert (Path(log.uri) / "images" / "notes.txt").exists()
    holds(log, {"a": 0, "b": 0, "c": 0})


def test_readers_of_the_retention_keep_their_files(log: TransactionLog) -> None:
    """A file written long ago and replaced just now is being read."""
    put_images(log, {"a": 0})
    held = snapshot(log)
    for folder, _, names in os.walk(log.uri):
        for name in names:
            os.utime(os.path.join(folder, name), (time.time() - 10 * DAY,) * 2)
    put_images(log, {"a": 1})
    assert garbage(open_for_writing(log), 168) == []
    opened = held.table("images", SCHEMA)
    assert opened and opened.read(["version"]).to_pylist() == [{"version": 0}]


def make(log: TransactionLog, change: Change) -> None:
    """A change that does not depend on what the store holds."""
    transact(log, lambda _: change, run_id="r", command="test")


def test_what_pointers_stand_on_is_no_garbage(log: TransactionLog) -> None:
    folder = Path(log.uri, "index", "photos")
    folder.mkdir(parents=True)
    first, second, killed = (f"2026010{day}T000000Z-abcdef-vectors.faiss" for day in (1, 2, 3))
    for name in ("manifest-1.json", first, "manifest-2.json", second, killed, "notes.txt", "my.faiss"):
        (folder / name).write_text(name)
    for at, segment in ((1, first), (2, second)):
        pointer = Pointer(f"index/photos/manifest-{at}.json", None, (f"index/photos/{segment}",))
        make(log, Change(pointers={"index/photos": pointer}))
    assert garbage(open_for_writing(aged(log, 8)), 168) == [
        f"index/photos/{name}" for name in (first, killed, "manifest-1.json")
    ]
    for name in ("manifest-2.json", second, killed):
        os.utime(folder / name, (time.time() - 10 * DAY,) * 2)
    assert garbage(open_for_writing(log), 168) == [], "the log does not reach back that far"


def test_nothing_behind_a_link_is_swept(log: TransactionLog, tmp_path: Path) -> None:
    put_images(log, {"a": 0})
    outside = tmp_path / "outside"
    made_table(str(outside), SCHEMA)
    (outside / "precious.parquet").write_text("somebody's")
    (Path(log.uri) / "parts").symlink_to(outside)
    assert garbage(open_for_writing(aged(log, 8)), 168) == []
    make(log, Change(sweep=["parts/precious.parquet"]))
    assert "leads out of its folder" in log.messages[-1]
    with pytest.raises(JobError, match="outside the store"):
        make(log, Change(sweep=["../outside/precious.parquet"]))
    assert (outside / "precious.parquet").exists()


def test_a_leftover_that_cannot_be_removed_holds_nobody_up(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(log, {"a": 0})
    leftover = write(log, "images", {"z": 0})
    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "rm_file", _not_permitted)
        make(log, Change(sweep=[f"images/{leftover.path}"]))
    (message,) = log.messages
    assert "1 unused file could not be removed" in message and "not permitted" in message
    put_images(log, {"b": 0})
    holds(log, {"a": 0, "b": 0})


def _not_permitted(*_: Any) -> None:
    raise PermissionError(1, "Operation not permitted")
