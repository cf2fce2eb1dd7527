"""The vectors that an index is made of, streamed out of a store's tables a row group at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dino_ops.nearest import pool
from pipelines import storage
from pipelines.settings.sections import IndexSettings
from pipelines.store.parquet import open_parquet
from pipelines.store.schemas import scale_column
from pipelines.store.store import Store
from pipelines.store.vectors import decode

# FAISS adds many vectors with all cores, few with one.
VECTORS_PER_BATCH = 65_536


@dataclass(frozen=True)
class VectorBatch:
    """Vectors of whole images.

    image_ids, run_ids: of m images. counts: (m,) int64, vectors of each. vectors: (n, D) float32, n = sum of counts.
    cells: row, col, y, x of each vector when they are patches, else None.
    """

    image_ids: pa.Array
    run_ids: pa.Array
    counts: np.ndarray
    vectors: np.ndarray
    cells: pa.Table | None


def check_store(store: Store, asked: IndexSettings) -> None:
    """Raises RequestError when the store cannot have what is to be indexed."""
    store.requires("an index", images=True)
    if asked.of == "embeddings":
        store.requires("index.of=embeddings", embedding=True, instead="give --set index.of=pooled")
        return
    descriptor = ("index.descriptor", asked.descriptor)
    instead = "give --set index.of=embeddings"
    store.requires(f"index.of={asked.of}", patches=True, descriptor=descriptor, instead=instead)


def held_settings(asked: IndexSettings) -> dict[str, Any]:
    """The settings that an index has for life; None where they do not matter."""
    return {
        "of": asked.of,
        "pooling": asked.pooling if asked.of == "pooled" else None,
        "descriptor": asked.descriptor if asked.of != "embeddings" else None,
    }


def vector_batches(store: Store, asked: IndexSettings, images: pa.Table) -> Iterator[VectorBatch]:
    """Vectors of some images of a store, in batches of about VECTORS_PER_BATCH.

    images: image_id, run_id, shard, file (of the images table that holds the row).

    Raises JobError for a file of patches that is gone.
    """
    small = _embeddings(store, images) if asked.of == "embeddings" else _patches(store, asked, images)
    waiting: list[VectorBatch] = []
    for batch in small:
        waiting.append(batch)
        if sum(len(one.vectors) for one in waiting) >= VECTORS_PER_BATCH:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _embeddings(store: Store, images: pa.Table) -> Iterator[VectorBatch]:
    for path in sorted(pc.unique(images["file"]).to_pylist()):
        wanted = images["image_id"].filter(pc.equal(images["file"], path)).combine_chunks()
        rows = store.images.read_file(path, ["image_id", "run_id", "embedding"])
        if len(wanted) < len(rows):
            rows = rows.filter(pc.is_in(rows["image_id"], value_set=wanted))
        ids, runs = (rows[name].combine_chunks() for name in ("image_id", "run_id"))
        vectors = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
        yield VectorBatch(ids, runs, np.ones(len(rows), np.int64), vectors, None)


def _patches(store: Store, asked: IndexSettings, images: pa.Table) -> Iterator[VectorBatch]:
    """Read from the shards that images rows name: those are of the same snapshot as the rows."""
    for shard in sorted(pc.unique(images["shard"]).drop_null().to_pylist()):
        of_shard = images.filter(pc.equal(images["shard"], shard))
        uri = storage.join(store.patches.uri, shard)
        with open_parquet(uri, store.patches.options) as parquet:
            yield from _shard_patches(parquet, asked, of_shard)


def _shard_patches(parquet: pq.ParquetFile, asked: IndexSettings, images: pa.Table) -> Iterator[VectorBatch]:
    columns = ["image_id", "row", "col", "y", "x", asked.descriptor]
    if scale_column(asked.descriptor) in parquet.schema_arrow.names:
        columns.append(scale_column(asked.descriptor))
    wanted = images["image_id"].combine_chunks()
    # Row groups hold whole images.
    for index in range(parquet.num_row_groups):
        rows = parquet.read_row_group(index, columns=columns)
        rows = rows.filter(pc.is_in(rows["image_id"], value_set=wanted))
        if not len(rows):
            continue
        stretches = pc.run_end_encode(rows["image_id"].combine_chunks())
        ends = np.asarray(stretches.run_ends, np.int64)
        ids = stretches.values
        runs = images["run_id"].combine_chunks().take(pc.index_in(ids, value_set=wanted))
        vectors, counts, cells = decode(rows, asked.descriptor), np.diff(ends, prepend=0), None
        if asked.of == "pooled":
            vectors = np.stack([pool(one, asked.pooling) for one in np.split(vectors, ends[:-1])])
            counts = np.ones(len(ids), np.int64)
        else:
            cells = rows.select(["row", "col", "y", "x"])
        yield VectorBatch(ids, runs, counts, vectors, cells)


def _joined(batches: Iterable[VectorBatch]) -> VectorBatch:
    all_batches = list(batches)
    cells = [batch.cells for batch in all_batches if batch.cells is not None]
    return VectorBatch(
        pa.concat_arrays([batch.image_ids for batch in all_batches]),
        pa.concat_arrays([batch.run_ids for batch in all_batches]),
        np.concatenate([batch.counts for batch in all_batches]),
        np.concatenate([batch.vectors for batch in all_batches]),
        pa.concat_tables(cells) if cells else None,
    )
