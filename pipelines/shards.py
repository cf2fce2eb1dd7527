"""Writing shards: whole images in key order, one patches file and one images file, and what the driver must know.

A worker writes both files under names nobody else uses; they become visible when the driver commits them. A row group
holds whole images, about 64 of them, so that looking up one image_id reads one row group.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import Config
from pipelines.schemas import IMAGES, descriptor_columns, parquet_options, patches_schema, scale_column, vector
from pipelines.tables import DataFile, Table

if TYPE_CHECKING:
    from dino_ops.extractor import ImageFeatures
    from dino_ops.pca import PCA

IMAGES_PER_ROW_GROUP = 64
ROWS_PER_ROW_GROUP = 32_768  # bounds memory where a stride makes thousands of patches an image
HALF_MAX = 65_504.0  # the largest float16


@dataclass
class ShardReport:
    """What a worker tells the driver: a shard is written, images failed, or just how far it is."""

    kind: str  # shard | progress | failed
    positions: list[int] = field(default_factory=list)  # of the images in the shard, in the run's pending table
    image_ids: list[str] = field(default_factory=list)
    patches: DataFile | None = None
    images: DataFile | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)  # FAILURES columns plus `position`
    seconds: dict[str, float] = field(default_factory=dict)  # fetch, decode, model, write
    bytes_read: int = 0
    bytes_written: int = 0
    done: int = 0  # images extracted since the last report
    failed: int = 0  # images failed since the last report
    device: str = ""
    error: dict[str, Any] | None = None  # why `positions` are still undone: stage, error, message, errno

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


class ShardWriter:
    """Collects images of one shard and writes them, a row group at a time.

    Raises OSError (or what the storage driver raises) when a write fails; `discard` then removes what was begun.
    """

    def __init__(self, store: str, config: Config, run_id: str, projections: dict[str, PCA] | None = None) -> None:
        self.config = config
        self.run_id = run_id
        self.projections = projections or {}
        self.schema = patches_schema(config)
        self._options = config.storage.options
        self._patches = storage.join(store, "patches")
        self._images = storage.join(store, "images")
        self.name = new_file_name(run_id)
        self.opened_at = time.monotonic()
        self.positions: list[int] = []
        self.rows = 0
        self._image_rows: list[dict[str, Any]] = []
        self._waiting: list[pa.Table] = []
        self._with_patches: list[str] = []
        self._sink: Any = None
        self._parquet: pq.ParquetWriter | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def image_ids(self) -> list[str]:
        return [row["image_id"] for row in self._image_rows]

    def add(self, source: dict[str, Any], features: ImageFeatures) -> None:
        """Add one image: `source` is its listing row with `position`."""
        self.positions.append(source["position"])
        self._image_rows.append(self._image_row(source, features))
        keep = self._kept(features)
        if len(keep):
            patches = self._patch_rows(source["image_id"], features, keep)
            self._with_patches.append(source["image_id"])
            self._waiting.append(patches)
            waiting_rows = sum(len(rows) for rows in self._waiting)
            if len(self._waiting) >= IMAGES_PER_ROW_GROUP or waiting_rows >= ROWS_PER_ROW_GROUP:
                self._flush()

    def close(self) -> tuple[DataFile | None, DataFile]:
        """Finish both files; (patches or None when no image has stored patches, images)."""
        self._flush()
        patches = None
        if self._parquet is not None:
            self._parquet.close()
            self._sink.close()
            size = self._size(self._patches)
            patches = DataFile(self.name, size, self.rows, min(self._with_patches), max(self._with_patches))
        now = dt.datetime.now(dt.UTC)
        with_patches = set(self._with_patches)
        for row in self._image_rows:
            row["shard"] = self.name if row["image_id"] in with_patches else None
            row["extracted_at"] = now
        images = images_table(self._image_rows)
        fs, path = storage.filesystem(storage.join(self._images, self.name), self._options)
        with fs.open(path, "wb") as sink:
            pq.write_table(images, sink, **parquet_options(IMAGES))
        ids = self.image_ids
        return patches, DataFile(self.name, self._size(self._images), len(ids), min(ids), max(ids))

    def discard(self) -> None:
        """Remove what a failed write left; nothing of it was ever visible."""
        for table in (self._patches, self._images):
            fs, path = storage.filesystem(storage.join(table, self.name), self._options)
            with contextlib.suppress(Exception):  # the sink may be what broke; only the removal matters
                if self._sink is not None:
                    self._sink.close()
            with contextlib.suppress(Exception):  # nor must a storage that fails hide why this was called
                if fs.exists(path):
                    fs.rm_file(path)

    def _size(self, table: str) -> int:
        fs, path = storage.filesystem(storage.join(table, self.name), self._options)
        return fs.size(path)

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._parquet is None:
            fs, path = storage.filesystem(storage.join(self._patches, self.name), self._options)
            self._sink = fs.open(path, "wb")
            self._parquet = pq.ParquetWriter(self._sink, self.schema, **parquet_options(self.schema))
        group = pa.concat_tables(self._waiting)
        self._parquet.write_table(group, row_group_size=len(group))
        self.rows += len(group)
        self._waiting = []

    def _image_row(self, source: dict[str, Any], features: ImageFeatures) -> dict[str, Any]:
        grid_height, grid_width = features.y.shape
        return {
            **{name: source[name] for name in ("image_id", "uri", "label", "source_size", "source_version")},
            "width": features.width,
            "height": features.height,
            "model_width": features.model_width,
            "model_height": features.model_height,
            "grid_width": grid_width,
            "grid_height": grid_height,
            "embedding": features.embedding,
            "run_id": self.run_id,
        }

    def _patch_rows(self, image_id: str, features: ImageFeatures, keep: np.ndarray) -> pa.Table:
        grid_height, grid_width = features.y.shape
        rows, cols = np.divmod(np.arange(grid_height * grid_width, dtype=np.int32)[keep], np.int32(grid_width))
        saliency = None if features.saliency is None else features.saliency.reshape(-1)[keep]
        columns: list[pa.Array] = [
            pa.DictionaryArray.from_arrays(np.zeros(len(rows), np.int32), [image_id]).cast(pa.string()),
            pa.array(rows),
            pa.array(cols),
            pa.array(features.y.reshape(-1)[keep], pa.float32()),
            pa.array(features.x.reshape(-1)[keep], pa.float32()),
            pa.nulls(len(rows), pa.float32()) if saliency is None else pa.array(saliency, pa.float32()),
        ]
        for column in descriptor_columns(self.config):
            vectors = descriptor_map(features, column)
            vectors = vectors.reshape(-1, vectors.shape[-1])[keep]
            if column in self.projections:
                vectors = self.projections[column].transform(vectors)
            columns += encode(np.ascontiguousarray(vectors, np.float32), self.config.store.dtype)
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _kept(self, features: ImageFeatures) -> np.ndarray:
        """Indices (raster order) of the patches that the spec stores."""
        cells = features.y.size
        if self.config.store.patches == "none":
            return np.zeros(0, np.int64)
        keep = np.arange(0, cells, self.config.store.every)
        if self.config.store.patches == "salient":
            assert features.saliency is not None  # the configuration was checked for it
            keep = keep[features.saliency.reshape(-1)[keep] > self.config.store.salient_threshold]
        return keep


def new_file_name(run_id: str) -> str:
    """A name that nobody else uses, and that says which run wrote it."""
    return f"part-{run_id}-{uuid.uuid4().hex[:12]}.parquet"


def descriptor_map(features: ImageFeatures, column: str) -> np.ndarray:
    """The (gh, gw, D) map that a descriptor column stores."""
    if column == "descriptor":
        assert features.descriptor is not None
        return features.descriptor
    return features.extra[column.removeprefix("descriptor_")]


def encode(vectors: np.ndarray, dtype: str) -> list[pa.Array]:
    """Vectors (n, D) float32 as the columns that store them: [list<float>], or [list<int8>, scale]."""
    if dtype == "float32":
        return [_lists(vectors, pa.float32())]
    if dtype == "float16":
        # clipped, since a rare huge activation must not become infinite
        return [_lists(np.clip(vectors, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32), pa.float32())]
    scale = np.abs(vectors).max(axis=1, initial=0.0) / 127.0
    steps = np.rint(vectors / np.where(scale > 0, scale, 1.0)[:, None]).astype(np.int8)
    return [_lists(steps, pa.int8()), pa.array(scale, pa.float32())]


def decode(table: pa.Table, column: str) -> np.ndarray:
    """A descriptor column of patches rows as (n, D) float32, whatever it is stored as."""
    lists = table[column].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    vectors = values.reshape(len(table), -1) if len(table) else values.reshape(0, 0)
    if scale_column(column) in table.column_names:
        vectors = vectors * table[scale_column(column)].to_numpy()[:, None]
    return vectors


def _lists(vectors: np.ndarray, values: pa.DataType) -> pa.Array:
    count, width = vectors.shape
    offsets = np.arange(0, (count + 1) * width, width, dtype=np.int32) if width else np.zeros(count + 1, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vectors.reshape(-1), values), type=vector(values))


def images_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=IMAGES)


def rewrite_without(table: Table, file: DataFile, image_ids: Iterable[str], run_id: str) -> DataFile | None:
    """A copy of a file of `table` without the rows of some images; None when nothing would be left."""
    return rewrite(table, file, run_id, lambda rows: _without(rows, image_ids))


def rewrite(table: Table, file: DataFile, run_id: str, change: Callable[[pa.Table], pa.Table]) -> DataFile | None:
    """A changed copy of a file, row group by row group, with our encodings; None when no row is left.

    `change` maps the rows of one row group to those that the copy has.
    """
    name = new_file_name(run_id)
    fs, source_path = storage.filesystem(storage.join(table.uri, file.path), table.options)
    _, target_path = storage.filesystem(storage.join(table.uri, name), table.options)
    kept = 0
    low, high = [], []
    with fs.open(source_path, "rb") as source, fs.open(target_path, "wb") as sink:
        parquet = pq.ParquetFile(source)
        schema = table.schema
        with pq.ParquetWriter(sink, schema, **parquet_options(schema)) as writer:
            for index in range(parquet.num_row_groups):
                rows = change(parquet.read_row_group(index).cast(schema))
                if len(rows):
                    writer.write_table(rows, row_group_size=len(rows))
                    kept += len(rows)
                    bounds = pc.min_max(rows[table.key])
                    low.append(bounds["min"].as_py())
                    high.append(bounds["max"].as_py())
    if not kept:
        fs.rm_file(target_path)
        return None
    return DataFile(name, fs.size(target_path), kept, min(low), max(high))


def _without(rows: pa.Table, image_ids: Iterable[str]) -> pa.Table:
    gone = pc.is_in(rows["image_id"], value_set=pa.array(list(image_ids), pa.string()))
    return rows.filter(pc.invert(gone))
