"""An index as it should be: built of all images, or the one there is with what changed put in and taken out.

New vectors become a flat segment of their own. Segments are merged so that they stay few and small beside the base:

- When MERGED_AT_ONCE segments are of one order of size, the newest of them included, they become one. So a vector is
  written again once for every factor of MERGED_AT_ONCE by which the index is larger than an update, there are at most
  MERGED_AT_ONCE - 1 segments of an order, and a flat index needs no other rule: its base is the oldest segment.
- In front of a graph or compressed vectors, segments are compared with one by one. When they hold more than
  SEGMENTS_SHARE of the base's vectors, or more than a flat index is chosen for, they go into the base, which costs what
  adding them there at once would have cost, and one reading and writing of the base.
- What was removed is hidden. When that is more than MAX_DEAD_SHARE of all vectors, it is dropped from the base, with a
  merge of everything; a graph cannot drop it and is built again.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ops.nearest import (
    MAX_DEAD_SHARE,
    MAX_VALUES_READ_PER_QUERY,
    MIN_TRAINING_VECTORS,
    Choice,
    NearestIndex,
    choose_kind,
    estimate_bytes,
    training_size,
)
from pipelines.errors import RequestError
from pipelines.index.changes import Changes
from pipelines.results.index_vectors import VectorBatch, held_settings, vector_batches
from pipelines.results.indices import (
    CELLS,
    DEAD,
    IMAGES,
    Manifest,
    Part,
    ids_of,
    read_dead,
    read_part,
    without_dead,
    write_dead,
    write_part,
)
from pipelines.settings.sections import IndexSettings
from pipelines.store.store import Store

MERGED_AT_ONCE = 8
SEGMENTS_SHARE = 0.1


def worn(before: Manifest, gone: pa.Table) -> str:
    """A reason to purge the base or to build it again: too much is dead once `gone` is taken out; else empty."""
    total = sum(segment.vectors for segment in before.segments)
    dead = before.dead + _total(gone["vectors"])
    return f"{dead:,} of its {total:,} vectors had been removed" if dead > MAX_DEAD_SHARE * total else ""


def build(
    store: Store,
    asked: IndexSettings,
    name: str,
    everything: Changes,
    before: Manifest | None,
    run_id: str,
    files: set[str],
) -> Manifest:
    """An index of all images; its files are named in `files`."""
    images = everything.fresh
    count = _count_vectors(store, asked, images)
    first = next(vector_batches(store, asked, images), None)
    if first is None:
        raise RequestError(f"The store {store.uri} has no {asked.descriptor} of any image: there is nothing to index.")
    dimension = first.vectors.shape[1]
    choice = _choose(asked, count, dimension, before)
    sample = _sample(store, asked, images, count) if choice.kind == "ivfpq" else None
    growing = _GrowingPart(NearestIndex.create(choice.kind, dimension, count, sample), asked, next_id=0)
    growing.put_in(store, images)
    segment = write_part(store, name, growing.finish(), run_id, files)
    return Manifest(
        number=before.number + 1 if before else 1,
        **held_settings(asked),
        kind=choice.kind,
        why=choice.why,
        dimension=dimension,
        fingerprint=store.fingerprint,
        images_version=everything.version,
        images_files=everything.files,
        images=segment.images,
        count=segment.vectors,
        dead=0,
        next_id=growing.next_id,
        run_id=run_id,
        segments=[segment],
    )


def update(
    store: Store, asked: IndexSettings, name: str, before: Manifest, changes: Changes, run_id: str, files: set[str]
) -> Manifest:
    """The index with what changed taken out and put in; new files are named in `files`."""
    dead_before = read_dead(store, name, before)
    dead = pa.concat_tables([dead_before, changes.gone.cast(DEAD)])
    new = _count_vectors(store, asked, changes.fresh)
    kept = 0 if worn(before, changes.gone) else kept_segments(before, new, len(changes.fresh))
    growing = _GrowingPart(NearestIndex.create("flat", before.dimension), asked, before.next_id)
    for place, segment in enumerate(before.segments[kept:], kept):
        part = read_part(store, name, before, segment, dead)
        if place == 0:
            growing = _GrowingPart.of_base(part, dead, asked, before.next_id)
        else:
            growing.absorb(part, dead)
    growing.put_in(store, changes.fresh)
    segments = before.segments[:kept]
    if len((part := growing.finish()).images):
        segments.append(write_part(store, name, part, run_id, files))

    # those of merged segments have left, but for those in a graph
    first_left = max(kept, 1) if before.kind == "hnsw" else kept
    lasting = [segment.first_id for segment in before.segments[first_left:]]
    dead = dead.filter(pc.less(dead["first_id"], lasting[0] if lasting else before.next_id))
    dead_file = before.dead_file
    if not dead.equals(dead_before):
        dead_file = write_dead(store, name, dead, run_id, files) if len(dead) else None
    vectors_dead = _total(dead["vectors"])
    return replace(
        before,
        number=before.number + 1,
        images_version=changes.version,
        images_files=changes.files,
        images=sum(segment.images for segment in segments) - len(dead),
        count=sum(segment.vectors for segment in segments) - vectors_dead,
        dead=vectors_dead,
        next_id=growing.next_id,
        run_id=run_id,
        segments=segments,
        dead_file=dead_file,
    )


def kept_segments(before: Manifest, vectors: int, images: int) -> int:
    """How many of the segments stay as they are; those after them are merged with what is new."""
    segments = before.segments
    if before.kind != "flat":
        beside = vectors + sum(segment.vectors for segment in segments[1:])
        if beside > min(SEGMENTS_SHARE * segments[0].vectors, MAX_VALUES_READ_PER_QUERY / before.dimension):
            return 0
    first_mergeable = 0 if before.kind == "flat" else 1
    kept, size = len(segments), vectors + images
    while True:
        like = kept
        while like > first_mergeable and _order(segments[like - 1].vectors + segments[like - 1].images) <= _order(size):
            like -= 1
        if kept - like + 1 < MERGED_AT_ONCE:
            return kept
        size += sum(segment.vectors + segment.images for segment in segments[like:kept])
        kept = like


def _order(size: int) -> int:
    """0 below MERGED_AT_ONCE, 1 below its square, and so on."""
    return 0 if size < MERGED_AT_ONCE else 1 + _order(size // MERGED_AT_ONCE)


class _GrowingPart:
    """A part that vectors are added to."""

    def __init__(self, nearest: NearestIndex, asked: IndexSettings, next_id: int) -> None:
        self.nearest = nearest
        self.next_id = next_id
        self._asked = asked
        self._images = [IMAGES.empty_table()]
        self._cells = [CELLS.empty_table()]

    @classmethod
    def of_base(cls, part: Part, dead: pa.Table, asked: IndexSettings, next_id: int) -> _GrowingPart:
        """The base, without what is dead where that can be dropped."""
        growing = cls(part.nearest, asked, next_id)
        part.nearest.purge()
        growing._keep(part, dead if part.nearest.kind != "hnsw" else DEAD.empty_table())
        return growing

    def absorb(self, part: Part, dead: pa.Table) -> None:
        """Add what is alive of a flat part."""
        self.nearest.absorb(part.nearest)
        self._keep(part, dead)

    def _keep(self, part: Part, dead: pa.Table) -> None:
        self._images.append(without_dead(part.images, dead))
        if part.cells is not None:
            gone = pc.is_in(part.cells["id"], value_set=pa.array(ids_of(dead)))
            self._cells.append(part.cells.filter(pc.invert(gone)) if len(dead) else part.cells)

    def put_in(self, store: Store, images: pa.Table) -> None:
        """Add images, those without vectors too."""
        with_vectors = [pa.nulls(0, pa.string())]
        for batch in vector_batches(store, self._asked, images):
            self._put_in_batch(batch)
            with_vectors.append(batch.image_ids)
        without = images.filter(pc.invert(pc.is_in(images["image_id"], value_set=pa.concat_arrays(with_vectors))))
        own_ids = np.arange(self.next_id, self.next_id + len(without))
        self._add_images(without["image_id"], without["run_id"], own_ids, np.zeros(len(without), np.int64))
        self.next_id += len(without)

    def _put_in_batch(self, batch: VectorBatch) -> None:
        ids = np.arange(self.next_id, self.next_id + len(batch.vectors))
        first_ids = self.next_id + np.cumsum(batch.counts) - batch.counts
        self.nearest.add(batch.vectors, ids)
        self._add_images(batch.image_ids, batch.run_ids, first_ids, batch.counts)
        if batch.cells is not None:
            self._cells.append(batch.cells.add_column(0, "id", pa.array(ids)).cast(CELLS))
        self.next_id += len(ids)

    def _add_images(self, image_ids: pa.Array, run_ids: pa.Array, first_ids: np.ndarray, counts: np.ndarray) -> None:
        columns = [image_ids, run_ids, pa.array(first_ids, pa.int64()), pa.array(counts, pa.int64())]
        self._images.append(pa.Table.from_arrays(columns, schema=IMAGES))

    def finish(self) -> Part:
        cells = pa.concat_tables(self._cells) if self._asked.of == "patches" else None
        return Part(self.nearest, pa.concat_tables(self._images), cells)


def _total(counts: pa.ChunkedArray) -> int:
    return pc.sum(counts).as_py() or 0


def _count_vectors(store: Store, asked: IndexSettings, images: pa.Table) -> int:
    if asked.of == "embeddings":
        return len(images)
    if asked.of == "pooled":
        return len(images) - images["shard"].null_count
    shards = set(images["shard"].to_pylist())
    return sum(file.rows for path, file in store.patches.files().items() if path in shards)


def _choose(asked: IndexSettings, count: int, dimension: int, before: Manifest | None) -> Choice:
    """The kind of a new index; one that is built again keeps its own while that fits.

    Raises RequestError for a kind that does not go with the count or the memory.
    """
    budget = memory_budget(asked)
    if asked.kind == "auto":
        if before and (size := estimate_bytes(before.kind, count, dimension)) <= budget:
            return Choice(before.kind, before.why, size)
        try:
            return choose_kind(count, dimension, budget)
        except MemoryError as error:
            raise RequestError(f"{error}, index.memory_gb is {budget / 1e9:.3g}: give more.") from None
    if asked.kind == "ivfpq" and count < MIN_TRAINING_VECTORS:
        raise RequestError(
            f"index.kind is ivfpq, which is trained on at least {MIN_TRAINING_VECTORS:,} vectors, and here are "
            f"{count:,}: give auto, flat or hnsw."
        )
    size = estimate_bytes(asked.kind, count, dimension)
    if size > budget:
        raise RequestError(
            f"An index of kind {asked.kind} takes {size / 1e9:.3g} GB, index.memory_gb is {budget / 1e9:.3g}: "
            "give auto, or more."
        )
    return Choice(asked.kind, "index.kind asked for it", size)


def memory_budget(asked: IndexSettings) -> float:
    """Bytes that the index may take."""
    if asked.memory_gb is not None:
        return asked.memory_gb * 1e9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def _sample(store: Store, asked: IndexSettings, images: pa.Table, count: int) -> np.ndarray:
    """Vectors from everywhere in the store, to train on: a pass of its own, so that memory stays bounded."""
    chosen = np.sort(np.random.default_rng(0).choice(count, training_size(count), replace=False))
    found, first = [], 0
    for batch in vector_batches(store, asked, images):
        low, high = np.searchsorted(chosen, [first, first + len(batch.vectors)])
        found.append(batch.vectors[chosen[low:high] - first])
        first += len(batch.vectors)
    return np.concatenate(found)
