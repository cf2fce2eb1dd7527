"""Descriptors as the tables store them, and back: float32, rounded to half precision, or int8 with a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.store.schemas import scale_column, vector

if TYPE_CHECKING:
    from dino_ops.extractor import ImageFeatures

LARGEST_FLOAT16 = 65_504.0
# Measured, with zstd.
BYTES_PER_VALUE = {"float16": 1.91, "float32": 3.81, "int8": 0.89}


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
        return [
            _lists(
                np.clip(vectors, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16).astype(np.float32), pa.float32()
            )
        ]
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
