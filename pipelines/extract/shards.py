"""Writing shards: whole images in key order, one patches file and one images file, and what the driver must know.

A worker writes both files under names that no other writer uses; they become visible when the driver commits them. A
row group holds whole images, about 64 of them, so that looking up one image_id reads one row group.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.features.stored_patches import stored_patches
from pipelines.settings.sections import Config
from pipelines.storage.secrets import without_credentials
from pipelines.store.parquet import IMAGES_PER_ROW_GROUP, ROWS_PER_ROW_GROUP, DataFile, new_file_name, parquet_options
from pipelines.store.schemas import IMAGES, descriptor_columns, patches_schema
from pipelines.store.vectors import descriptor_map, encode

if TYPE_CHECKING:
    from dino_ops.extractor import ImageFeatures
    from dino_ops.pca import PCA


class ShardWriter:
    """Collects images of one shard and writes them, a row group at a time.

    Raises OSError (or what the storage driver raises) when a write fails; `discard` then removes what was written.
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
        keep = stored_patches(features, self.config.store)
        if len(keep):
            patches = self._patch_rows(source["image_id"], features, keep)
            self._with_patches.append(source["image_id"])
            self._waiting.append(patches)
            waiting_rows = sum(len(rows) for rows in self._waiting)
            if len(self._waiting) >= IMAGES_PER_ROW_GROUP or waiting_rows >= ROWS_PER_ROW_GROUP:
                self._flush()

    def close(self) -> tuple[DataFile | None, DataFile]:
        """Finish both files. Returns (patches, or None when no image has stored patches; images)."""
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
            # the sink may be what broke; only the removal matters
            with contextlib.suppress(Exception):
                if self._sink is not None:
                    self._sink.close()
            # a storage that fails must not hide why this was called
            with contextlib.suppress(Exception):
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
            **{name: source[name] for name in ("image_id", "label", "source_size", "source_version")},
            "uri": without_credentials(source["uri"]),
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


def images_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=IMAGES)
