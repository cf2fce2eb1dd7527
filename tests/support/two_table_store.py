"""Small changes to a store of two tables, as jobs make them through its one door, and how such a store is judged.

An image is one row in `images` and one in `patches`: (image_id, version). As in a real store, files hold several
images, and replacing one rewrites its file.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from pipelines.storage.files import join
from pipelines.storage.filesystems import delta_options
from pipelines.store.changes import Change, TableChange
from pipelines.store.garbage import garbage
from pipelines.store.parquet import DataFile, new_file_name, write_parquet
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import Build, transact

SCHEMA = pa.schema([("image_id", pa.string()), ("version", pa.int64())])
TABLES = ("patches", "images")  # in the order in which they are published

DAY = 24 * 3600.0  # seconds

Images = dict[str, int]  # image_id -> version


def put_images(log: TransactionLog, images: Images, command: str = "extract") -> int | None:
    """Have images in the store in these versions; nothing is done for those that are."""
    return transact(log, replacing(log, images), run_id=uuid.uuid4().hex, command=command)


def replacing(log: TransactionLog, images: Images) -> Build:
    """Files are written before, as workers do, and again without what is done elsewhere."""
    written = {table: write(log, table, images) for table in TABLES}

    def build(current: Snapshot) -> Change | None:
        done = set(_flat(held_images(current, "images")))
        due = {image_id: version for image_id, version in images.items() if (image_id, version) not in done}
        if not due:
            return None
        changes = []
        for table in TABLES:
            file = written[table] if due == images else write(log, table, due)
            remove, copies = without(log, current, table, due)
            changes.append(TableChange(table, SCHEMA, [file, *copies], remove))
        return Change(changes)

    return build


def drop_images(log: TransactionLog, image_ids: Iterable[str]) -> int | None:
    """As prune does."""
    wanted = set(image_ids)

    def build(current: Snapshot) -> Change | None:
        changes = []
        for table in TABLES:
            remove, copies = without(log, current, table, wanted)
            if remove:
                changes.append(TableChange(table, SCHEMA, copies, remove))
        return Change(changes) if changes else None

    return transact(log, build, run_id=uuid.uuid4().hex, command="extract")


def compact(log: TransactionLog, meanwhile: Callable[[], object] = lambda: None) -> int | None:
    """Merge all files of both tables, unless one of them is gone by then."""
    seen = snapshot(log)
    old = {table: list(seen.files(table)) for table in TABLES}
    if min(len(files) for files in old.values()) < 2:
        return None
    merged = {table: write(log, table, dict(_flat(held_images(seen, table)))) for table in TABLES}
    meanwhile()

    def build(current: Snapshot) -> Change | None:
        if any(path not in current.files(table) for table in TABLES for path in old[table]):
            return None
        return Change([TableChange(table, SCHEMA, [merged[table]], old[table], rearranges=True) for table in TABLES])

    return transact(log, build, run_id=uuid.uuid4().hex, command="compact")


def sweep(log: TransactionLog, retention_hours: float = 0) -> list[str]:
    """Remove what nobody names; what that was."""
    gone: list[str] = []

    def build(current: Snapshot) -> Change | None:
        gone[:] = garbage(current, retention_hours)
        return Change(sweep=gone) if gone else None

    transact(log, build, run_id=uuid.uuid4().hex, command="compact")
    return gone


def write(log: TransactionLog, table: str, images: Images) -> DataFile:
    rows = pa.table({"image_id": sorted(images), "version": [images[key] for key in sorted(images)]}, SCHEMA)
    return write_parquet(join(log.uri, table), new_file_name("r"), rows, log.options)


def without(
    log: TransactionLog, current: Snapshot, table: str, image_ids: Iterable[str]
) -> tuple[list[str], list[DataFile]]:
    """(files of a table that hold some images, copies without them)."""
    wanted, remove, copies = set(image_ids), [], []
    for path, held in held_images(current, table).items():
        if wanted.intersection(dict(held)):
            kept = {image_id: version for image_id, version in held if image_id not in wanted}
            remove.append(path)
            copies += [write(log, table, kept)] if kept else []
    return remove, copies


def held_images(current: Snapshot, table: str) -> dict[str, list[tuple[str, int]]]:
    """What the files of a table hold."""
    opened = current.table(table, SCHEMA)
    if opened is None:
        return {}
    found = {path: opened.read_file(path) for path in opened.files()}
    return {
        path: list(zip(rows["image_id"].to_pylist(), rows["version"].to_pylist(), strict=True))
        for path, rows in found.items()
    }


def _flat(held: dict[str, list[tuple[str, int]]]) -> list[tuple[str, int]]:
    return [row for rows in held.values() for row in rows]


def seen_by_a_reader(log: TransactionLog) -> Images:
    """Images of the newest snapshot; each once, and the same ones in both tables."""
    current = snapshot(TransactionLog(log.uri, log.options))
    found = [Counter(_flat(held_images(current, table))) for table in TABLES]
    assert found[0] == found[1], f"a reader of transaction {current.number} found {found}"
    assert set(found[0].values()) <= {1}, found[0]
    assert len(dict(found[0].keys())) == len(found[0]), f"an image in two versions: {found[0]}"
    return dict(found[0].keys())


def holds(log: TransactionLog, images: Images) -> None:
    """Assert that a store holds these images, once, for its readers and for plain readers of Delta tables, that
    every file is there, and that the log has every number once."""
    assert seen_by_a_reader(log) == images
    for table in TABLES:
        uri = join(log.uri, table)
        rows = DeltaTable(uri, storage_options=delta_options(uri, log.options)).to_pyarrow_table()
        assert len(rows) == len(images) and pc.count_distinct(rows["image_id"]).as_py() == len(images)
    listing = log.listing()
    assert listing.numbers[-1] in listing.marked
    assert listing.numbers == list(range(listing.numbers[0], listing.newest + 1))


def log_of(arguments: dict[str, Any]) -> TransactionLog:
    return TransactionLog(arguments["store"], arguments.get("options") or {})


def fresh(log: TransactionLog) -> TransactionLog:
    """As another process opens it."""
    return TransactionLog(log.uri, log.options)


def in_other_words(log: TransactionLog, images: Images) -> None:
    """Every image of a store in one file more, by a transaction each: what is to be compacted."""
    for image_id, version in images.items():
        put_images(log, {image_id: version})


def with_old_images(log: TransactionLog) -> TransactionLog:
    put_images(log, {"a": 0, "b": 0})
    put_images(log, {"d": 0})
    return log


def files_in(log: TransactionLog) -> set[str]:
    return {os.path.join(folder, name) for folder, _, names in os.walk(log.uri) for name in names}


def aged(log: TransactionLog, days: float) -> TransactionLog:
    """The same store as a process sees it whose clock is ahead."""
    return TransactionLog(log.uri, log.options, clock=lambda: time.time() + days * DAY)
