"""parts/NAME in a store: the tables `images` and `patches`, and the settings that they were made with.

An image of a set is done when its row in `images` is committed, which happens after its patches are; a set is done when
all of its images are, in the set_version of its members. A run that is killed between the two commits leaves a file
of patches that no image names: `repair` removes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import counted
from pipelines.results.names import result_uri
from pipelines.results.stored import ResultTables
from pipelines.store.commit import ORPHAN_GRACE_SECONDS, FileChange, apply_remaining, commit_in_order, describe_file
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.parquet import DataFile
from pipelines.store.rewriting import rewrite
from pipelines.store.schemas import PARTS_IMAGES, PARTS_PATCHES
from pipelines.store.table import CommitConflict, Table

KEY = ["set_id", "image_id"]
VERSIONED = [*KEY, "set_version"]

_NOTHING = pa.array([], pa.string())


@dataclass
class SegmentReport:
    """What a worker wrote; the driver commits it.

    keys: of the rows in images, as `keys_of` makes them. failed: set_id -> why nothing could be made of the set.
    seconds: read, fit, segment and write.
    """

    images: DataFile | None
    patches: DataFile | None
    keys: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    without_foreground: int = 0
    noted: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class PartTables(ResultTables):
    """The two tables of one NAME at the versions last refreshed."""

    kind = "parts"
    schemas: ClassVar = {"images": PARTS_IMAGES, "patches": PARTS_PATCHES}
    leading = "images"

    def __init__(self, store: str, name: str, options: storage.Options) -> None:
        super().__init__(store, name, options)
        self._seen = set(self.images.files())

    @property
    def images(self) -> Table:
        return self.tables["images"]

    @property
    def patches(self) -> Table:
        return self.tables["patches"]

    def row_counts(self) -> dict[str, int]:
        """Sets, images of all sets, and those without any foreground."""
        rows = self.images.read(["set_id", "foreground_fraction"])
        empty = pc.sum(pc.equal(rows["foreground_fraction"], 0)).as_py() or 0
        return {"sets": len(pc.unique(rows["set_id"])), "images": len(rows), "without_foreground": empty}

    def describe(self, counts: dict[str, int]) -> str:
        without = f"{counts['without_foreground']:,} without foreground"
        return f"{counted(counts['images'], 'image')} in {counted(counts['sets'], 'set')} ({without})"

    def linked_tables(self) -> Iterator[LinkedTables]:
        yield LinkedTables(self.patches, self.images)
        yield LinkedTables(self.images)

    def repair(self, run_id: str) -> dict[str, int]:
        """Undo what a killed run left between its commits; the images table decides what is true.

        Safe while a job is running: its files are given time to be named, and it checks them itself afterwards.
        """
        orphans = self.patches.files().keys() - self._named()
        if orphans:
            time.sleep(ORPHAN_GRACE_SECONDS)
            self.refresh()
            orphans = self.patches.files().keys() - self._named()
        apply_remaining(self.patches, FileChange(remove=sorted(orphans)), run_id)
        if orphans:
            # a slow job may have named them after we looked: they are put back below
            self.images.refresh()
        lost = self._named() - self.patches.files().keys()
        found = [shard for shard in sorted(lost) if self.patches.has_file(shard)]
        apply_remaining(self.patches, FileChange(add=[describe_file(self.patches, shard) for shard in found]), run_id)
        gone = pa.array(sorted(lost.difference(found)), pa.string())
        rows = self.images.read([*VERSIONED, "shard"])
        dropped = self.drop(rows.filter(pc.is_in(rows["shard"], value_set=gone)), run_id)
        self._seen = set(self.images.files())
        return {"orphans_removed": len(orphans), "shards_restored": len(found), "images_lost": dropped}

    def _named(self) -> set[str]:
        return set(pc.unique(self.images.read(["shard"])["shard"]).to_pylist()) - {None}

    def drop(self, rows: pa.Table, run_id: str) -> int:
        """Remove images of sets and their patches, in one commit a table. Returns how many rows of images were removed.

        rows: VERSIONED columns of images; rows of another version, which another run may have added meanwhile, stay.
        """
        unwanted = keys_of(rows, VERSIONED)
        while len(unwanted):
            images, patches, dropped = FileChange(), FileChange(), 0
            files = self.patches.files()
            for path, file in self.images.files().items():
                held = self.images.read_file(path, [*VERSIONED, "shard"])
                hit = held.filter(pc.is_in(keys_of(held, VERSIONED), value_set=unwanted))
                if not len(hit):
                    continue
                dropped += len(hit)
                self._change_pair(
                    file, set(held["shard"].to_pylist()) & files.keys(), keys_of(hit), images, patches, run_id
                )
            try:
                commit_in_order((self.patches, patches), (self.images, images), run_id)
                self._seen |= {file.path for file in images.add}
                return dropped
            except CommitConflict:
                self.refresh()
        return 0

    def _change_pair(
        self, file: DataFile, shards: set[str], gone: pa.Array, images: FileChange, patches: FileChange, run_id: str
    ) -> None:
        """Add to two changes what it takes to remove rows from a file of images and from its patches."""
        files = self.patches.files()
        copies: dict[str, str | None] = {}
        for shard in shards:
            copy = _without(self.patches, files[shard], gone, run_id)
            patches.remove.append(shard)
            patches.add += [copy] if copy else []
            copies[shard] = copy.path if copy else None
        kept = _without(self.images, file, gone, run_id, copies)
        images.remove.append(file.path)
        images.add += [kept] if kept else []

    def commit(self, reports: Iterable[SegmentReport], run_id: str) -> list[SegmentReport]:
        """Make files of workers visible. Returns what became visible, without images that another run did first."""
        left = [report for report in reports if report.images]
        while True:
            done = self._done_elsewhere(pa.array([key for report in left for key in report.keys], pa.string()))
            left = [kept for report in left if (kept := self._without_done(report, done, run_id))]
            images = FileChange(add=[report.images for report in left if report.images])
            patches = FileChange(add=[report.patches for report in left if report.patches])
            try:
                commit_in_order((self.patches, patches), (self.images, images), run_id)
                break
            except CommitConflict:
                self.refresh()
        self._seen |= {file.path for file in images.add}
        # another run's repair may have taken our patches for orphans just before their images arrived
        self.patches.refresh()
        apply_remaining(self.patches, patches, run_id)
        return left

    def _done_elsewhere(self, wanted: pa.Array) -> pa.Array:
        """Which of these keys are in files that this run's plan did not see."""
        found = [_NOTHING]
        for path in self.images.files().keys() - self._seen:
            keys = keys_of(self.images.read_file(path, KEY))
            found.append(keys.filter(pc.is_in(keys, value_set=wanted)))
        return pa.concat_arrays(found)

    def _without_done(self, report: SegmentReport, done: pa.Array, run_id: str) -> SegmentReport | None:
        """The report without what another run finished first; None when nothing is left of it."""
        gone = set(done.to_pylist()).intersection(report.keys)
        if not gone:
            return report
        assert report.images and report.patches
        removed = pa.array(sorted(gone), pa.string())
        patches = _without(self.patches, report.patches, removed, run_id)
        copies = {report.patches.path: patches.path if patches else None}
        images = _without(self.images, report.images, removed, run_id, copies)
        keys = [key for key in report.keys if key not in gone]
        return replace(report, images=images, patches=patches, keys=keys) if images else None


def keys_of(rows: pa.Table, columns: list[str] = KEY) -> pa.Array:
    """One string for each row, made of some of its columns."""
    joined = pc.binary_join_element_wise(*(rows[name] for name in columns), "\0")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def parts_uri(store: str, name: str) -> str:
    """Raises RequestError for a name that cannot be a folder's."""
    return result_uri(store, "parts", name)


def _without(
    table: Table, file: DataFile, gone: pa.Array, run_id: str, renamed: dict[str, str | None] | None = None
) -> DataFile | None:
    """A copy of a file without the rows of some keys, the files of patches renamed; None when nothing is left."""

    def change(rows: pa.Table) -> pa.Table:
        rows = rows.filter(pc.invert(pc.is_in(keys_of(rows), value_set=gone)))
        if renamed:
            shards = [renamed.get(shard, shard) for shard in rows["shard"].to_pylist()]
            rows = rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array(shards, pa.string()))
        return rows

    return rewrite(table, file, run_id, change)
