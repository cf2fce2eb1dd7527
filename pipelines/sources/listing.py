"""What listing an INPUT gives: a row for every image, sorted by image_id, and what was passed over or damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import InputError

LISTING_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),  # key relative to INPUT, or the manifest's id
        pa.field("uri", pa.string()),  # where the bytes are; inside a container: CONTAINER/MEMBER
        pa.field("label", pa.string()),
        pa.field("source_size", pa.int64()),  # bytes; of the whole file for images inside Parquet
        pa.field("source_version", pa.string()),  # etag, else mtime in ns; of the container for images inside one
        pa.field("container", pa.string()),  # tar or Parquet file that holds the bytes
        pa.field("offset", pa.int64()),  # first byte inside a tar
        pa.field("row_group", pa.int32()),  # inside a Parquet file
        pa.field("row", pa.int32()),  # inside that row group
        pa.field("error", pa.string()),  # why the bytes cannot be there, known when listing
    ]
)


@dataclass(frozen=True)
class BrokenContainer:
    """A tar or Parquet file that is damaged; what could be read before the damage is listed."""

    uri: str
    image_id: str
    source_version: str
    error: str  # class name
    message: str


@dataclass(frozen=True)
class Listing:
    """The images of an INPUT."""

    table: pa.Table  # LISTING_SCHEMA, sorted by image_id, ids unique
    skipped: dict[str, int]  # extension -> files passed over because they are not images by name
    broken: list[BrokenContainer]
    kind: str  # directory | tar | manifest | parquet


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
            f"{asked} names images with the same id ({shown}{', ...' if len(names) > 3 else ''}; {len(twice)} rows too "
            "many): give each image an id of its own."
        )
