"""What was said to be done survives a power cut, and what was on its way has happened or has not."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from every_step import each_step
from killable_processes import KillableProcesses
from power_cuts import cut_power, make_disk, mounted_disk
from two_table_store import (
    TABLES,
    files_in,
    fresh,
    holds,
    put_images,
    seen_by_a_reader,
    with_old_images,
)

from pipelines.store.changes import Change, Pointer
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import transact


def test_a_power_cut_at_every_step(processes: KillableProcesses, tmp_path: Path) -> None:
    """What was said to be done is there, and the change that was on its way has happened or has not."""
    template = make_disk(tmp_path / "template")
    before, wanted = {"a": 0, "b": 0, "d": 0}, {"a": 1, "b": 0, "c": 0, "d": 0}
    with mounted_disk(template, tmp_path / "disk") as disk:
        with_old_images(TransactionLog(str(disk / "store")))
    for step in each_step():
        image = cut_power(template, tmp_path / "image")
        with mounted_disk(image, tmp_path / "disk") as disk:
            log = TransactionLog(str(disk / "store"))
            step.ended(processes.run("put", store=log.uri, images=[{"a": 1, "c": 0}], die_at=step.number))
            found = cut_power(image, tmp_path / "found")
        with mounted_disk(found, tmp_path / "disk"):
            assert seen_by_a_reader(log) in ([wanted] if step.is_past else [before, wanted]), f"{step}"
            put_images(fresh(log), {"a": 1, "c": 0})
            holds(log, wanted)


def test_the_first_change_of_a_store_survives_a_power_cut(processes: KillableProcesses, tmp_path: Path) -> None:
    image = make_disk(tmp_path / "image")
    with mounted_disk(image, tmp_path / "disk") as disk:
        log = TransactionLog(str(disk / "new" / "store"))
        assert processes.run("put", store=log.uri, images=[{"a": 0}]) == 0
        found = cut_power(image, tmp_path / "found")
    with mounted_disk(found, tmp_path / "disk"):
        holds(log, {"a": 0})


def tear(path: Path) -> None:
    """Empty it, as of a moment before the machine started."""
    path.write_bytes(b"")
    os.utime(path, (time.time() - 60,) * 2)


def test_what_a_power_cut_left_of_a_commit_is_made_again(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    put_images(log, {"a": 1, "b": 0})
    Path(log.uri_of(2, "published")).unlink()  # it is written when everything is on the disk
    tear(Path(log.uri, "images", "_delta_log", f"{2:020}.json"))
    Path(log.uri, "patches", "_delta_log", f"{2:020}.json").unlink()
    assert put_images(fresh(log), {"a": 1}) is None
    holds(log, {"a": 1, "b": 0})
    assert all(os.path.getsize(path) for path in files_in(log) if "_delta_log" in path)


def test_what_a_power_cut_left_of_a_new_table_is_made_again(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    Path(log.uri_of(1, "published")).unlink()
    for version in (0, 1):
        tear(Path(log.uri, "images", "_delta_log", f"{version:020}.json"))
    assert put_images(fresh(log), {"b": 0}) == 2
    holds(log, {"a": 0, "b": 0})


def test_what_a_power_cut_left_of_a_checkpoint_goes(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    put_images(log, {"b": 0})
    Path(log.uri_of(2, "published")).unlink()
    DeltaTable(f"{log.uri}/images").create_checkpoint()
    (checkpoint,) = Path(log.uri, "images", "_delta_log").glob("*.parquet")
    tear(checkpoint)
    assert put_images(fresh(log), {"c": 0}) == 3
    holds(log, {"a": 0, "b": 0, "c": 0})


@pytest.fixture
def order(log: TransactionLog, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced, put, committed and marked from now on, by its path in the store."""
    order: list[str] = []
    fsync, link, commit = os.fsync, os.link, DeltaTable.create_write_transaction

    def named(path: str) -> str:
        return os.path.relpath(path, log.uri).split(".json.")[0]

    def sync(descriptor: int) -> None:
        order.append(f"sync {named(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def put(source: str, target: str) -> None:
        link(source, target)
        order.append(f"put {named(target)}")

    def publish(delta: DeltaTable, *arguments: Any, **options: Any) -> None:
        commit(delta, *arguments, **options)
        order.append(f"commit {named(delta.table_uri.removeprefix('file://').rstrip('/'))}")

    def mark(one: TransactionLog, number: int) -> None:
        order.append("mark")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", put)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", publish)
    monkeypatch.setattr(TransactionLog, "mark_published", mark)
    return order


def test_what_counts_is_on_the_disk_before_the_next_step(log: TransactionLog, order: list[str]) -> None:
    """Data before the transaction that names it, the transaction before any table, tables before the mark."""
    put_images(log, {"a": 0})
    at = {what: order.index(what) for what in order}
    last = {what: len(order) - 1 - order[::-1].index(what) for what in order}
    written = at[f"put transactions/{1:020}.json"]
    for table in TABLES:
        (file,) = snapshot_files(log, table)
        for synced in (f"sync {table}/{file}", f"sync {table}", "sync .", f"sync transactions/{1:020}"):
            assert at[synced] < written, synced
        assert written < last["sync transactions"] < at[f"commit {table}"]
        for synced in (f"sync {table}/_delta_log/{0:020}.json", f"sync {table}/_delta_log/{1:020}.json"):
            assert at[f"commit {table}"] < at[synced] < at["mark"]
        assert at[f"commit {table}"] < last[f"sync {table}/_delta_log"] < at["mark"]
        assert at[f"commit {table}"] < last[f"sync {table}"] < at["mark"]


def test_what_a_result_points_at_is_on_the_disk_before_the_transaction(log: TransactionLog, order: list[str]) -> None:
    folder = Path(log.uri, "index", "photos")
    folder.mkdir(parents=True)
    for name in ("manifest-1.json", "a.faiss"):
        (folder / name).write_text(name)
    pointer = Pointer("index/photos/manifest-1.json", None, ("index/photos/a.faiss",))
    transact(log, lambda _: Change(pointers={"index/photos": pointer}), run_id="r", command="index")
    written = order.index(f"put transactions/{1:020}.json")
    for synced in (*pointer.every_file, "index/photos", "index", "."):
        assert order.index(f"sync {synced}") < written, synced


def snapshot_files(log: TransactionLog, table: str) -> list[str]:
    return [Path(path).name for path in DeltaTable(f"{log.uri}/{table}").file_uris()]
