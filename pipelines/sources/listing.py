"""What listing an INPUT gives: a row for every image, sorted by image_id, and what was skipped or damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import InputError, counted

LISTING_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("label", pa.string()),
        pa.field("source_size", pa.int64()),
        pa.field("source_version", pa.string()),
        pa.field("container", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("row_group", pa.int32()),
        pa.field("row", pa.int32()),
        pa.field("error", pa.string()),
    ]
)
"""Columns of a listing, one row an image.

image_id: key relative to INPUT, or the manifest's id. uri: where the bytes are; CONTAINER/MEMBER inside a container.
source_size: bytes; for an image inside Parquet those of the whole file. source_version: etag, else mtime in ns; for an
image inside a container the container's. container: tar or Parquet file that holds the bytes. offset: the image's first
byte inside a tar. row_group: its number in a Parquet file. row: the row's number in that row group. error: why the
bytes cannot be there, where that was known when listing.
"""


@dataclass(frozen=True)
class BrokenContainer:
    """A tar or Parquet file that is damaged; what could be read before the damage is listed.

    error: the name of the error's class.
    """

    uri: str
    image_id: str
    source_version: str
    error: str
    message: str


@dataclass(frozen=True)
class Listing:
    """The images of an INPUT.

    table: rows of LISTING_SCHEMA, sorted by image_id, ids unique. skipped: extension -> how many files were skipped
    because they are not images by name. kind: directory, tar, manifest or parquet.
    """

    table: pa.Table
    skipped: dict[str, int]
    broken: list[BrokenContainer]
    kind: str


@dataclass
class Rows:
    """Columns of a listing while it grows; lists of plain values are the leanest thing Arrow takes."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in LISTING_SCHEMA.names})
    skipped: Counter[str] = field(default_factory=Counter)
    broken: list[BrokenContainer] = field(default_factory=list)

    def add(self, image_id: str, uri: str, label: str | None, size: int, version: str, **place: Any) -> None:
        columns = self.columns
        columns["image_id"].append(image_id)
        columns["uri"].append(uri)
        columns["label"].append(label)
        columns["source_size"].append(size)
        columns["source_version"].append(version)
        for name in ("container", "offset", "row_group", "row", "error"):
            columns[name].append(place.get(name))

    def extend(self, others: Iterable[Rows]) -> None:
        for other in others:
            for name, values in other.columns.items():
                self.columns[name] += values
            self.skipped += other.skipped
            self.broken += other.broken

    def __len__(self) -> int:
        return len(self.columns["image_id"])

    def finish(self, kind: str, asked: str) -> Listing:
        """Sort and check. Raises InputError when two images have one id."""
        table = pa.Table.from_arrays(
            [pa.array(self.columns[field.name], field.type) for field in LISTING_SCHEMA], schema=LISTING_SCHEMA
        )
        table = table.take(pc.sort_indices(table, [("image_id", "ascending")]))
        _refuse_duplicates(table["image_id"], asked)
        return Listing(table, dict(self.skipped), self.broken, kind)


def _refuse_duplicates(sorted_ids: pa.ChunkedArray, asked: str) -> None:
    if len(sorted_ids) < 2:
        return
    twice = sorted_ids.slice(1).filter(pc.equal(sorted_ids.slice(1), sorted_ids.slice(0, len(sorted_ids) - 1)))
    if len(twice):
        names = list(dict.fromkeys(twice.slice(0, 1000).to_pylist()))
        shown = ", ".join(repr(name) for name in names[:3])
        raise InputError(
            f"{asked} names images with the same id ({shown}{', ...' if len(names) > 3 else ''}; "
            f"{counted(len(twice), 'row')} too many): give each image an id of its own."
        )
