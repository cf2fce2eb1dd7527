"""parts/NAME in a store: the tables `images` and `patches`, and the settings that they were made with.

An image of a set is done when its row in `images` is there; a set is done when all of its images are, in the
set_version of its members. The patches of an image come in the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import counted
from pipelines.results.linked_results import LinkedResult
from pipelines.results.names import result_uri
from pipelines.store.parquet import DataFile
from pipelines.store.schemas import PARTS_IMAGES, PARTS_PATCHES
from pipelines.store.snapshots import Snapshot
from pipelines.store.table import Table

KEY = ["set_id", "image_id"]
VERSIONED = [*KEY, "set_version"]


@dataclass
class SegmentReport:
    """What a worker wrote; the driver commits it.

    keys: of the rows in images, as `keys_of` makes them. rows: VERSIONED, run_id, foreground_fraction and note of them.
    failed: set_id -> why nothing could be made of the set. seconds: read, fit, segment and write.
    """

    images: DataFile | None
    patches: DataFile | None
    keys: list[str] = field(default_factory=list)
    rows: pa.Table | None = None
    failed: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def without_foreground(self) -> int:
        """How many of the rows have nothing in mask_png."""
        return 0 if self.rows is None else pc.sum(pc.equal(self.rows["foreground_fraction"], 0)).as_py() or 0

    @property
    def noted(self) -> int:
        """How many of the rows have a note."""
        return 0 if self.rows is None else len(self.rows) - self.rows["note"].null_count


class PartTables(LinkedResult[SegmentReport]):
    """The two tables of one NAME at the versions last refreshed.

    set_versions: from a snapshot to the set_version that each set has in it; without it an image counts as current
    whatever became of the other members of its set.
    """

    kind = "parts"
    schemas: ClassVar = {"images": PARTS_IMAGES, "patches": PARTS_PATCHES}
    leading = "images"
    data = "patches"
    key_columns = KEY
    versioned = VERSIONED
    extractions = (("image_id", "run_id"),)
    rows_are = "images"
    command = "cosegment"
    set_versions: Callable[[Snapshot], Mapping[str, str]] | None = None

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

    @classmethod
    def keys_of(cls, rows: pa.Table) -> pa.Array:
        return keys_of(rows)

    @staticmethod
    def files_of(report: SegmentReport) -> tuple[DataFile | None, DataFile | None]:
        return report.images, report.patches

    @staticmethod
    def rows_of(report: SegmentReport) -> pa.Table:
        return report.rows

    def reduced(
        self, report: SegmentReport, gone: pa.Array, leading: DataFile | None, data: DataFile | None
    ) -> SegmentReport:
        assert report.rows is not None
        rows = report.rows.filter(pc.invert(pc.is_in(keys_of(report.rows), value_set=gone)))
        return replace(report, images=leading, patches=data, rows=rows, keys=keys_of(rows).to_pylist())

    def are_current(self, current: Snapshot, rows: pa.Table) -> np.ndarray:
        found = super().are_current(current, rows)
        if self.set_versions is not None:
            versions = self.set_versions(current)
            said = zip(rows["set_id"].to_pylist(), rows["set_version"].to_pylist(), strict=True)
            found &= np.array([versions.get(set_id) == version for set_id, version in said], bool)
        return found


def keys_of(rows: pa.Table, columns: list[str] = KEY) -> pa.Array:
    """One string for each row, made of some of its columns."""
    joined = pc.binary_join_element_wise(*(rows[name] for name in columns), "\0")
    return joined.combine_chunks() if isinstance(joined, pa.ChunkedArray) else joined


def parts_uri(store: str, name: str) -> str:
    """Raises RequestError for a name that cannot be a folder's."""
    return result_uri(store, "parts", name)
