"""Reading the patches of a few images: only the files, row groups and columns that are needed."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import JobError
from pipelines.store.damage import run_repair
from pipelines.store.parquet import MissingFile, checked_parquet, damage_explained, group_may_hold
from pipelines.store.schemas import scale_column
from pipelines.store.vectors import decode


@dataclass(frozen=True)
class ImagePlace:
    """Where the patches of an image are. shard: a file under patches/. grid: (rows, columns)."""

    image_id: str
    shard: str
    grid: tuple[int, int]


@dataclass(frozen=True)
class PatchMap:
    """The patches of one image with a grid of gh x gw.

    descriptor: (gh, gw, D) float16 or float32. saliency: (gh, gw) float32. y, x: (gh, gw) float32, patch centres in
    pixels of the original image.
    """

    descriptor: np.ndarray
    saliency: np.ndarray
    y: np.ndarray
    x: np.ndarray


@dataclass
class PatchMaps:
    """Patches of several images, in few large arrays, which Ray shares between processes without copying.

    descriptors: (patches, D), one of each row group. others: (3, patches) float32, saliency, y and x of each row group.
    places: image_id -> (row group, first row, grid).
    """

    descriptors: list[np.ndarray] = field(default_factory=list)
    others: list[np.ndarray] = field(default_factory=list)
    places: dict[str, tuple[int, int, tuple[int, int]]] = field(default_factory=dict)
    bytes_read: int = 0

    def of(self, image_id: str) -> PatchMap:
        group, first, grid = self.places[image_id]
        rows = slice(first, first + grid[0] * grid[1])
        saliency, y, x = self.others[group][:, rows].reshape(3, *grid)
        return PatchMap(self.descriptors[group][rows].reshape(*grid, -1), saliency, y, x)


def read_patch_maps(
    store: str, images: Iterable[ImagePlace], column: str, half: bool, options: storage.Options
) -> PatchMaps:
    """Read one descriptor column of some images; `half` holds it as float16, exact where it was stored so.

    Raises JobError for a file that is gone or cannot be read, and for an image whose grid is not complete.
    """
    maps = PatchMaps()
    by_shard: dict[str, dict[str, ImagePlace]] = {}
    for image in images:
        by_shard.setdefault(image.shard, {})[image.image_id] = image
    for shard, wanted in by_shard.items():
        uri = storage.join(store, "patches", shard)
        fs, path = storage.filesystem(uri, options)
        try:
            with (
                storage.reaching(uri),
                damage_explained(uri),
                fs.open(path, "rb", cache_type="none") as raw,
                CountedFile(raw) as file,
                # few large requests instead of one for each column
                checked_parquet(file, pre_buffer=True) as parquet,
            ):
                _read_shard(maps, parquet, wanted, column, half)
                maps.bytes_read += file.bytes_read
        except FileNotFoundError:
            raise MissingFile(uri) from None
        if missing := sorted(wanted.keys() - maps.places.keys()):
            raise JobError(f"{missing[0]} lacks patches in {uri}: {run_repair(store)}.")
    return maps


def _read_shard(
    maps: PatchMaps, parquet: pq.ParquetFile, wanted: dict[str, ImagePlace], column: str, half: bool
) -> None:
    columns = ["image_id", "row", "col", "saliency", "y", "x", column]
    if scale_column(column) in parquet.schema_arrow.names:
        columns.append(scale_column(column))
    ids = sorted(wanted)
    for index in range(parquet.num_row_groups):
        if not group_may_hold(parquet.metadata.row_group(index), ids):
            continue
        rows = parquet.read_row_group(index, columns=columns)
        rows = rows.filter(pc.is_in(rows["image_id"], value_set=pa.array(ids, pa.string())))
        if not len(rows):
            continue
        vectors = decode(rows, column)
        maps.descriptors.append(vectors.astype(np.float16) if half else vectors)
        maps.others.append(np.stack([rows[name].to_numpy() for name in ("saliency", "y", "x")]))
        cells = [rows[name].to_numpy() for name in ("row", "col")]
        stretches = pc.run_end_encode(rows["image_id"].combine_chunks())
        first = 0
        for image_id, end in zip(stretches.values.to_pylist(), stretches.run_ends.to_pylist(), strict=True):
            grid = wanted[image_id].grid
            complete = np.array_equal(cells[0][first:end] * grid[1] + cells[1][first:end], np.arange(grid[0] * grid[1]))
            # an image that is not complete is reported as missing
            if complete:
                maps.places[image_id] = (len(maps.descriptors) - 1, first, grid)
            first = end


class CountedFile(io.RawIOBase):
    """A file that counts what is read from it."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.bytes_read = 0

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(size)
        self.bytes_read += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
