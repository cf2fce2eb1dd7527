"""What extract and prune change in a store: each time one transaction over `patches`, `images` and `failures`.

Everything is decided in a `build` (pipelines.store.transactions), from the store as it is at that moment: images that
another run has done are dropped, rows of older versions are replaced in the files that hold them now, and failures of
images that are done go.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.store.changes import Change
from pipelines.store.extraction_changes import ExtractionChange, ImageRow, changed
from pipelines.store.parquet import DataFile, new_file_name
from pipelines.store.rewriting import rewrite, rewrite_without
from pipelines.store.schemas import FAILURES
from pipelines.store.snapshots import Snapshot
from pipelines.store.transactions import transact
from pipelines.store.written_files import WrittenFiles

if TYPE_CHECKING:
    from pipelines.store.store import Store

Versions = dict[str, tuple[int, str]]
"""image_id -> (source_size, source_version)"""


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    pending: listing rows with `position`, in key order. changed: pending images that have rows of an older version.
    gone: images of the store that are no longer in INPUT. seen: files of images that this was planned from.
    """

    pending: pa.Table
    changed: set[str]
    done: int
    failed_before: int
    gone: list[str]
    seen: frozenset[str] = frozenset()

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

    def __init__(self, store: Store, run_id: str, changed: Collection[str], seen: Collection[str] = ()) -> None:
        """changed, seen: as in the run's Plan. Files of images that were not seen are looked into for every image."""
        self.store = store
        self.run_id = run_id
        self._changed = set(changed)
        self._seen = set(seen)

    def commit(self, reports: Iterable[ShardReport], versions: Versions) -> Outcome:
        """Make shards and failures visible, in one transaction. versions: of what was read."""
        reports = list(reports)
        written, change, outcome = WrittenFiles(), None, Outcome()

        def build(current: Snapshot) -> Change | None:
            nonlocal change, outcome
            put_together = ExtractionChange(self.store, current, written, self.run_id)
            outcome = self._decide(put_together, reports, versions, written)
            change = put_together.as_change()
            return change

        transact(self.store.log, build, run_id=self.run_id, command="extract")
        written.remove_unused(change)
        # what they hold is settled for this run
        self._seen |= {report.images.path for report in reports if report.images}
        self.store.refresh()
        return outcome

    def _decide(
        self, change: ExtractionChange, reports: list[ShardReport], versions: Versions, written: WrittenFiles
    ) -> Outcome:
        shards = [report for report in reports if report.images is not None]
        failures = [failure for report in reports for failure in report.failures]
        ids = {image_id for shard in shards for image_id in shard.image_ids}
        done, stale = self._existing(change, ids | {failure["image_id"] for failure in failures}, versions)
        failures = [failure for failure in failures if failure["image_id"] not in done]
        change.remove_images(stale)
        for shard in shards:
            self._add_shard(change, shard, done, written)
        change.remove_failures((ids - done) | {failure["image_id"] for failure in failures})
        self._add_failures(change, failures, written)
        return Outcome(len(ids - done), len(failures), len(ids & done))

    def _existing(self, change: ExtractionChange, ids: set[str], versions: Versions) -> tuple[set[str], list[ImageRow]]:
        """Of these images: those that are done in the same version, and rows of others, which are to be replaced.

        An image with several rows, as older versions of this program could leave them, is not done.
        """
        images = change.table("images")
        wanted, planned = sorted(ids), sorted(ids & self._changed)
        found: dict[str, list[tuple[bool, ImageRow]]] = {}
        for path, file in change.files("images").items():
            look_for = planned if path in self._seen else wanted
            if not look_for or not file.may_hold(look_for):
                continue
            rows = images.read_file(path, ["image_id", "source_size", "source_version", "shard"])
            rows = rows.filter(pc.is_in(rows["image_id"], value_set=pa.array(look_for, pa.string())))
            for row in rows.to_pylist():
                same = (row["source_size"], row["source_version"]) == versions[row["image_id"]]
                one = ImageRow(row["image_id"], path, row["shard"])
                found.setdefault(row["image_id"], []).append((same, one))
        done = {image_id for image_id, rows in found.items() if len(rows) == 1 and rows[0][0]}
        stale = [row for image_id, rows in found.items() if image_id not in done for _, row in rows]
        return done, stale

    def _add_shard(self, change: ExtractionChange, shard: ShardReport, done: set[str], written: WrittenFiles) -> None:
        """Add what a worker wrote, without images that another run finished first."""
        assert shard.images is not None
        gone = frozenset(done.intersection(shard.image_ids))
        if not gone:
            change.add("patches", shard.patches)
            change.add("images", shard.images)
            return
        if len(gone) == len(set(shard.image_ids)):
            return
        images, of_patches, of_images = shard.images, change.table("patches"), change.table("images")
        renamed: dict[str, str | None] = {}
        if patches := shard.patches:
            copy = written.once(
                of_patches, (patches.path, gone), lambda: rewrite_without(of_patches, patches, gone, self.run_id)
            )
            renamed[patches.path] = copy.path if copy else None
            change.add("patches", copy)
        copy = written.once(
            of_images,
            (images.path, gone, frozenset(renamed.items())),
            lambda: rewrite(of_images, images, self.run_id, lambda rows: changed(rows, gone, renamed)),
        )
        change.add("images", copy)

    def _add_failures(self, change: ExtractionChange, failures: list[dict[str, Any]], written: WrittenFiles) -> None:
        if not failures:
            return
        table = change.table("failures")
        rows = sorted(failures, key=lambda failure: failure["image_id"])
        columns = [{name: row[name] for name in FAILURES.names} for row in rows]

        def write() -> DataFile:
            return table.write_file(new_file_name(self.run_id), pa.Table.from_pylist(columns, schema=FAILURES))

        change.add("failures", written.once(table, ("new", tuple(row["image_id"] for row in rows)), write))


def drop_images(
    store: Store,
    image_ids: Iterable[str],
    run_id: str,
    tables: tuple[str, ...] = ("images", "failures"),
    command: str = "extract",
) -> int:
    """Remove images and their patches, or failures, in one transaction. The number of rows removed."""
    wanted = set(image_ids)
    if not wanted:
        return 0
    written, change, removed = WrittenFiles(), None, 0

    def build(current: Snapshot) -> Change | None:
        nonlocal change, removed
        put_together, removed = ExtractionChange(store, current, written, run_id), 0
        if "images" in tables:
            rows = put_together.table("images").rows_with_ids(wanted, ["image_id", "shard"]).to_pylist()
            put_together.remove_images([ImageRow(row["image_id"], row["file"], row["shard"]) for row in rows])
            removed += len(rows)
        if "failures" in tables:
            removed += put_together.remove_failures(wanted)
        change = put_together.as_change()
        return change

    transact(store.log, build, run_id=run_id, command=command)
    written.remove_unused(change)
    store.refresh()
    return removed


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
