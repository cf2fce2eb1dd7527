"""Stores of many embeddings, written as tables directly: no model, no patches."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa

from pipelines.store.changes import Change, TableChange
from pipelines.store.parquet import new_file_name
from pipelines.store.schemas import IMAGES, vector
from pipelines.store.store import Store
from pipelines.store.transactions import transact


def add_embeddings(store: Store, run_id: str, first: int, embeddings: np.ndarray) -> None:
    """Commit one file of images that are called by their number, from `first`. embeddings: (n, D) float32."""
    count, dimension = embeddings.shape
    offsets = pa.array(np.arange(0, (count + 1) * dimension, dimension, dtype=np.int32))
    columns = {
        "image_id": pa.array([f"{number:08d}" for number in range(first, first + count)]),
        "embedding": pa.ListArray.from_arrays(offsets, pa.array(embeddings.reshape(-1)), type=vector(pa.float32())),
        "run_id": pa.repeat(run_id, count),
        "extracted_at": pa.repeat(pa.scalar(dt.datetime.now(dt.UTC), pa.timestamp("us", "UTC")), count),
    }
    rest = {field.name: pa.nulls(count, field.type) for field in IMAGES if field.name not in columns}
    rows = pa.table(columns | rest).select(IMAGES.names).cast(IMAGES)
    change = Change([TableChange("images", IMAGES, [store.images.write_file(new_file_name(run_id), rows)])])
    transact(store.log, lambda _: change, run_id=run_id, command="extract")
    store.images.refresh()
