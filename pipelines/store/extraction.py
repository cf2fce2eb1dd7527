"""The commit protocol: shards become visible whole, once, whatever other runs do and whenever this one is killed.

Order: patches, images, failures. An image is done when its images row is committed, so a kill between two commits
leaves patch files that no image names, which `Store.repair` removes. Every commit is compare-and-set: when another
run got in first, this one looks at what it did, drops the images that are done already, and tries again. Nothing is
locked and no clock is compared.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.store.commit import FileChange, apply_remaining, commit_in_order, retry_on_conflict
from pipelines.store.parquet import DataFile, new_file_name
from pipelines.store.rewriting import rewrite, rewrite_without
from pipelines.store.schemas import FAILURES
from pipelines.store.table import CommitConflict, Table

if TYPE_CHECKING:
    from pipelines.store.store import Store


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    pending: listing rows with `position`, in key order. changed: pending images that have rows of an older version.
    gone: images of the store that are no longer in INPUT.
    """

    pending: pa.Table
    changed: set[str]
    done: int
    failed_before: int
    gone: list[str]

    @classmethod
    def of_empty_store(cls, listing: pa.Table, *, retry_failed: bool = False, limit: int | None = None) -> Plan:
        """Everything is left."""
        pending = listing if limit is None else listing.slice(0, limit)
        pending = pending.append_column("position", pa.array(range(len(pending)), pa.int64()))
        return cls(pending, set(), 0, 0, [])


@dataclass
class Outcome:
    """What a commit did. done_elsewhere: images that another run had committed first."""

    extracted: int = 0
    failed: int = 0
    done_elsewhere: int = 0


class Committer:
    """Commits the shards of one run."""

    def __init__(self, store: Store, run_id: str, changed: set[str]) -> None:
        self.store = store
        self.run_id = run_id
        # images whose older rows these shards replace
        self._changed = changed
        # images files that the plan of this run took into account
        self._seen = set(store.images.files())

    def commit(self, reports: Iterable[ShardReport], versions: dict[str, tuple[int, str]]) -> Outcome:
        """Make shards and failures visible. `versions`: image_id -> (source_size, source_version) of what was read."""
        shards = [report for report in reports if report.images is not None]
        failures = [failure for report in reports for failure in report.failures]
        attempted = sum(len(shard.image_ids) for shard in shards)
        ids = {image_id for shard in shards for image_id in shard.image_ids}
        failed_ids = {failure["image_id"] for failure in failures}

        while True:
            done, stale = self._existing(ids | failed_ids, versions)
            shards = [kept for shard in shards if (kept := self._without(shard, done)) is not None]
            ids -= done
            patches, images = replace_rows(self.store, stale, self.run_id)
            patches.add += [shard.patches for shard in shards if shard.patches]
            images.add += [shard.images for shard in shards if shard.images]
            try:
                commit_rows(self.store, patches, images, self.run_id)
                break
            except CommitConflict:
                self.store.refresh()
        self._seen |= {file.path for file in images.add}
        # another run's repair may have taken our patch files for orphans just before their images arrived
        self.store.patches.refresh()
        apply_remaining(self.store.patches, FileChange(add=patches.add), self.run_id)
        failures = [failure for failure in failures if failure["image_id"] not in done]
        self._commit_failures(failures, ids)
        return Outcome(len(ids), len(failures), attempted - len(ids))

    def _existing(
        self, ids: set[str], versions: dict[str, tuple[int, str]]
    ) -> tuple[set[str], dict[str, tuple[str, str | None]]]:
        """Of these images: those that are done in the same version, and (images file, shard) of older rows."""
        table = self.store.images
        wanted = sorted(ids)
        changed = sorted(ids & self._changed)
        done: set[str] = set()
        stale: dict[str, tuple[str, str | None]] = {}
        for path, file in table.files().items():
            look_for = changed if path in self._seen else wanted
            if not look_for or not file.may_hold(look_for):
                continue
            rows = table.read_file(path, ["image_id", "source_size", "source_version", "shard"])
            rows = rows.filter(pc.is_in(rows["image_id"], value_set=pa.array(look_for, pa.string())))
            for row in rows.to_pylist():
                if (row["source_size"], row["source_version"]) == versions[row["image_id"]]:
                    done.add(row["image_id"])
                else:
                    stale[row["image_id"]] = (path, row["shard"])
        return done, stale

    def _without(self, shard: ShardReport, done: set[str]) -> ShardReport | None:
        """The shard without images that another run finished first; None when nothing is left of it."""
        gone = done.intersection(shard.image_ids)
        if not gone:
            return shard
        kept = [image_id for image_id in shard.image_ids if image_id not in gone]
        if not kept:
            return None
        assert shard.images is not None
        patches = shard.patches and rewrite_without(self.store.patches, shard.patches, gone, self.run_id)
        renamed = {shard.patches.path: patches.path if patches else None} if shard.patches else {}
        images = rewrite(self.store.images, shard.images, self.run_id, lambda rows: _change(rows, gone, renamed))
        return replace(shard, image_ids=kept, patches=patches, images=images)

    def _commit_failures(self, failures: list[dict[str, Any]], done: set[str]) -> None:
        table = self.store.failures

        def attempt() -> None:
            table.refresh()
            gone = done | {failure["image_id"] for failure in failures}
            change = FileChange()
            for path, file in table.files().items():
                if not file.may_hold(sorted(gone)):
                    continue
                held = set(table.read_file(path, ["image_id"])["image_id"].to_pylist())
                if held & gone:
                    kept = rewrite_without(table, file, gone, self.run_id)
                    change.remove.append(path)
                    change.add += [kept] if kept else []
            if failures:
                rows = sorted(failures, key=lambda failure: failure["image_id"])
                columns = [{name: row[name] for name in FAILURES.names} for row in rows]
                written = pa.Table.from_pylist(columns, schema=FAILURES)
                change.add.append(table.write_file(new_file_name(self.run_id), written))
            table.commit(change.add, change.remove, self.run_id)

        retry_on_conflict(attempt)


def commit_rows(store: Store, patches: FileChange, images: FileChange, run_id: str) -> None:
    """Commit to patches, then to images. Raises CommitConflict, with patches as before, when another run was first."""
    commit_in_order((store.patches, patches), (store.images, images), run_id)


def drop_images(
    store: Store, image_ids: Iterable[str], run_id: str, tables: tuple[str, ...] = ("images", "failures")
) -> int:
    """Remove images and their patches, or failures: one commit a table. The number of rows removed."""
    wanted = set(image_ids)
    removed = 0
    if "images" in tables:
        while True:
            store.refresh()
            rows = store.images.rows_with_ids(wanted, ["image_id", "shard"])
            stale = {row["image_id"]: (row["file"], row["shard"]) for row in rows.to_pylist()}
            try:
                commit_rows(store, *replace_rows(store, stale, run_id), run_id)
                removed += len(stale)
                break
            except CommitConflict:
                continue
    if "failures" in tables:

        def attempt() -> int:
            store.failures.refresh()
            rows = store.failures.rows_with_ids(wanted, ["image_id"])
            files = store.failures.files()
            hit = sorted(set(rows["file"].to_pylist()))
            kept = [rewrite_without(store.failures, files[path], wanted, run_id) for path in hit]
            store.failures.commit([file for file in kept if file], hit, run_id)
            return len(rows)

        removed += retry_on_conflict(attempt)
    return removed


def replace_rows(store: Store, stale: dict[str, tuple[str, str | None]], run_id: str) -> tuple[FileChange, FileChange]:
    """Changes to patches and images that remove images: copies without them take the place of their files.

    `stale`: image_id -> (images file, shard). Other images of a rewritten shard get its new name.
    """
    patches, images = FileChange(), FileChange()
    if not stale:
        return patches, images
    shard_files = store.patches.files()
    renamed: dict[str, str | None] = {}
    for shard in sorted({shard for _, shard in stale.values() if shard in shard_files}):
        gone = [image_id for image_id, (_, its_shard) in stale.items() if its_shard == shard]
        copy = rewrite_without(store.patches, shard_files[shard], gone, run_id)
        patches.remove.append(shard)
        patches.add += [copy] if copy else []
        renamed[shard] = copy.path if copy else None
    for path in _files_naming(store.images, {file for file, _ in stale.values()}, [shard_files[s] for s in renamed]):
        copy = rewrite(
            store.images, store.images.files()[path], run_id, lambda rows: _change(rows, set(stale), renamed)
        )
        images.remove.append(path)
        images.add += [copy] if copy else []
    return patches, images


def _files_naming(images: Table, certain: set[str], shards: list[DataFile]) -> list[str]:
    """Images files that hold the stale rows or name one of the shards."""
    found = set(certain)
    names = pa.array([shard.path for shard in shards], pa.string())
    for path, file in images.files().items():
        overlaps = any(shard.min_id <= file.max_id and file.min_id <= shard.max_id for shard in shards)
        if path not in found and overlaps:
            named = images.read_file(path, ["shard"])["shard"]
            if pc.any(pc.is_in(named, value_set=names)).as_py():
                found.add(path)
    return sorted(found)


def _change(rows: pa.Table, gone: set[str], renamed: dict[str, str | None]) -> pa.Table:
    """Images rows without `gone`, their shards renamed."""
    rows = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=pa.array(sorted(gone), pa.string()))))
    shards = [renamed.get(shard, shard) for shard in rows["shard"].to_pylist()]
    return rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array(shards, pa.string()))


@dataclass
class ShardReport:
    """What a worker reports to the driver: a shard is written, images failed, or just how far it is.

    kind: shard, progress or failed. positions: of the images in the shard, in the run's pending table. failures:
    FAILURES columns and `position`. seconds: fetch, decode, model and write. done, failed: images since the last
    report. error: why `positions` are still undone, as stage, error, message and errno.
    """

    kind: str
    positions: list[int] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    patches: DataFile | None = None
    images: DataFile | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    done: int = 0
    failed: int = 0
    device: str = ""
    error: dict[str, Any] | None = None

    def to_table(self) -> pa.Table:
        """As a one-row Ray block."""
        return pa.table({"report": [json.dumps(asdict(self), default=dt.datetime.isoformat)]})

    @classmethod
    def from_json(cls, text: str) -> ShardReport:
        values = json.loads(text)
        for name in ("patches", "images"):
            values[name] = DataFile(**values[name]) if values[name] else None
        for failure in values["failures"]:
            failure["failed_at"] = dt.datetime.fromisoformat(failure["failed_at"])
        return cls(**values)
