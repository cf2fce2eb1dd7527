"""index: embeddings or patches of a store become a FAISS index that is kept up to date in place.

what changed since the index -> take out what changed or is gone -> add what changed or is new -> publish
"""

from __future__ import annotations

import datetime as dt
import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ops.nearest import LEAST_TO_TRAIN, Choice, NearestIndex, choose_kind, estimate_bytes, training_size
from pipelines.config import Config, IndexSettings
from pipelines.errors import RequestError
from pipelines.index_files import (
    CELLS,
    IMAGES,
    IndexContent,
    Manifest,
    index_uri,
    publish,
    read_content,
    read_manifest,
    remove_files,
    unnamed_files,
    write_content,
)
from pipelines.index_vectors import VectorBatch, check_settings, vector_batches
from pipelines.runs import RunReport, new_run_id
from pipelines.store import Store
from pipelines.tables import explain_write_error

LEFTOVER_DAYS = 1  # files of a run that began longer ago and was killed are removed


@dataclass
class Result:
    """What a run of index did, or would do."""

    run_id: str
    store: str
    name: str
    of: str
    status: str = "running"  # running | done | unchanged | dry_run
    exit_code: int = 0
    kind: str = ""
    why: str = ""  # the kind was chosen
    memory_bytes: int = 0  # estimate of what the index takes in a search
    images: int = 0  # that the index covers
    count: int = 0  # vectors that a search can return
    dimension: int = 0
    added: int = 0  # images
    changed: int = 0
    removed: int = 0
    dead: int = 0  # removed vectors that still take space in a graph
    rebuilt: str = ""  # why an index that there was was built anew
    images_version: int = 0  # of the images table
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Changes:
    """Images since the index was written, as rows of image_id, run_id, shard; `gone` are ids in the index."""

    fresh: pa.Table  # new and changed
    gone: pa.Array  # changed and removed
    changed: int

    def __bool__(self) -> bool:
        return bool(len(self.fresh) or len(self.gone))


def run(config: Config, *, store: str, name: str, dry_run: bool = False) -> Result:
    """Build index/NAME of `store`, or bring it up to date: nothing is trained again.

    Raises:
        RequestError: the request was wrong, or the index was made with other settings or of another spec.
        JobError: the job failed; the index stays as it was.
    """
    started = time.monotonic()
    asked = config.index
    opened = Store.open(store, config)
    check_settings(opened, asked)
    before = read_manifest(opened, name)
    images = opened.images.read(["image_id", "run_id", "shard"])
    if not len(images):
        raise RequestError(f"The store {opened.uri} has no images: `dinoray extract INPUT {opened.uri}` adds some.")
    if before is not None:
        _refuse_other_content(opened, name, before, asked)
    content = read_content(opened, name, before) if before else None
    changes = _changes(images, content.images if content else IMAGES.empty_table())
    result = Result(new_run_id(), opened.uri, name, asked.of, images=len(images), images_version=opened.images.version)
    result.changed = changes.changed
    result.added, result.removed = len(changes.fresh) - changes.changed, len(changes.gone) - changes.changed
    if before and asked.kind not in ("auto", before.kind):
        result.rebuilt = f"kind {asked.kind} was asked for in place of {before.kind}"
    if dry_run:
        result.status = "dry_run"
        return result
    if before and not changes and not result.rebuilt and before.images_version == result.images_version:
        return _describe(result, before, "unchanged", started)

    report = RunReport("index", opened.uri, config, result.run_id, {"name": name})
    files: dict[str, str] = {}
    try:
        report.write(fingerprint=opened.fingerprint)
        manifest = _update(opened, asked, name, before, content, images, changes, files, result)
        publish(opened, name, manifest, before)
        yesterday = dt.datetime.now(dt.UTC) - dt.timedelta(days=LEFTOVER_DAYS)
        remove_files(opened, name, unnamed_files(opened, name, manifest, f"{yesterday:%Y%m%dT%H%M%SZ}"))
    except BaseException as error:
        new = set(files.values()) - set(before.files.values() if before else ())
        if (current := read_manifest(opened, name)) is None or current.run_id != result.run_id:
            remove_files(opened, name, new)
        report.finish("failed" if isinstance(error, Exception) else "interrupted")
        explained = explain_write_error(error, opened.uri) if isinstance(error, Exception) else None
        if explained is None:
            raise
        raise explained from None
    _describe(result, manifest, "done", started)
    report.finish("done", result=result.as_dict())
    return result


def _refuse_other_content(store: Store, name: str, before: Manifest, asked: IndexSettings) -> None:
    if (wanted := _holds(asked)) != before.holds:
        said = [f"index.{key} {value}, asked was {wanted[key]}" for key, value in before.holds.items()]
        said = [text for text, key in zip(said, wanted, strict=True) if wanted[key] != before.holds[key]]
        raise RequestError(
            f"The index {name} has {'; '.join(said)}: give its settings again, another NAME for these, or remove "
            f"{index_uri(store.uri, name)}."
        )


def _holds(asked: IndexSettings) -> dict[str, str | None]:
    """The settings that an index has for life; None where they do not matter."""
    return {
        "of": asked.of,
        "pooling": asked.pooling if asked.of == "pooled" else None,
        "descriptor": asked.descriptor if asked.of != "embeddings" else None,
    }


def _changes(images: pa.Table, indexed: pa.Table) -> Changes:
    """The anti-joins, both ways, of what there is with what is indexed; another extraction counts as another image."""
    at = pc.index_in(images["image_id"], value_set=indexed["image_id"].combine_chunks())
    known = pc.is_valid(at)
    same = pc.fill_null(pc.equal(indexed["run_id"].take(at), images["run_id"]), False)
    kept = images["image_id"].filter(same).combine_chunks()
    gone = indexed["image_id"].filter(pc.invert(pc.is_in(indexed["image_id"], value_set=kept))).combine_chunks()
    changed = pc.sum(pc.and_(known, pc.invert(same))).as_py() or 0
    return Changes(images.filter(pc.invert(same)), gone, changed)


def _update(
    store: Store,
    asked: IndexSettings,
    name: str,
    before: Manifest | None,
    content: IndexContent | None,
    images: pa.Table,
    changes: Changes,
    files: dict[str, str],
    result: Result,
) -> Manifest:
    """The manifest of the index as it should be, its files written and named in `files`."""
    why = before.why if before else ""
    if content is not None and not result.rebuilt:
        _take_out(content, changes.gone)
        if content.nearest.worn:
            dead = len(content.nearest.dead)
            result.rebuilt = f"{dead:,} of its {len(content.nearest.ids):,} vectors had been removed"
    if content is None or result.rebuilt:
        content, why = _build(store, asked, images, before)
    else:
        _put_in(content, vector_batches(store, asked, changes.fresh), changes.fresh)
        _warn_about_memory(content.nearest, asked, name, result)
    if before is not None and not changes and not result.rebuilt:
        files |= before.files  # only the table's version moved
    else:
        write_content(store, name, content, result.run_id, files)
    nearest, holds = content.nearest, _holds(asked)
    return Manifest(
        of=asked.of,
        pooling=holds["pooling"],
        descriptor=holds["descriptor"],
        kind=nearest.kind,
        why=why,
        dimension=nearest.dimension,
        fingerprint=store.fingerprint,
        images_version=result.images_version,
        images=len(content.images),
        count=len(nearest),
        dead=len(nearest.dead),
        next_id=content.next_id,
        run_id=result.run_id,
        files=files,
    )


def _build(store: Store, asked: IndexSettings, images: pa.Table, before: Manifest | None) -> tuple[IndexContent, str]:
    """A new index of all images, and why it is of its kind."""
    count = _count_vectors(store, asked, images)
    first = next(vector_batches(store, asked, images), None)
    if first is None:
        raise RequestError(f"The store {store.uri} has no {asked.descriptor} of any image: there is nothing to index.")
    dimension = first.vectors.shape[1]
    choice = _choose(asked, count, dimension)
    sample = None
    if choice.kind == "ivfpq":
        sample = _sample(store, asked, images, count)
    nearest = NearestIndex.create(choice.kind, dimension, count, sample)
    cells = CELLS.empty_table() if asked.of == "patches" else None
    content = IndexContent(nearest, IMAGES.empty_table(), cells, before.next_id if before else 0)
    _put_in(content, vector_batches(store, asked, images), images)
    return content, choice.why


def _count_vectors(store: Store, asked: IndexSettings, images: pa.Table) -> int:
    if asked.of == "embeddings":
        return len(images)
    if asked.of == "pooled":
        return len(images) - images["shard"].null_count
    shards = set(images["shard"].to_pylist())
    return sum(file.rows for path, file in store.patches.files().items() if path in shards)


def _choose(asked: IndexSettings, count: int, dimension: int) -> Choice:
    """Raises RequestError for a kind that does not go with the count or the memory."""
    budget = _memory_budget(asked)
    if asked.kind == "auto":
        try:
            return choose_kind(count, dimension, budget)
        except MemoryError as error:
            raise RequestError(f"{error}, index.memory_gb is {budget / 1e9:.3g}: give more.") from None
    if asked.kind == "ivfpq" and count < LEAST_TO_TRAIN:
        raise RequestError(
            f"index.kind is ivfpq, which is trained on at least {LEAST_TO_TRAIN:,} vectors, and here are {count:,}: "
            "give auto, flat or hnsw."
        )
    size = estimate_bytes(asked.kind, count, dimension)
    if size > budget:
        raise RequestError(
            f"An index of kind {asked.kind} takes {size / 1e9:.3g} GB, index.memory_gb is {budget / 1e9:.3g}: "
            "give auto, or more."
        )
    return Choice(asked.kind, "index.kind asked for it", size)


def _memory_budget(asked: IndexSettings) -> float:
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


def _take_out(content: IndexContent, image_ids: pa.Array) -> None:
    gone = pc.is_in(content.images["image_id"], value_set=image_ids)
    rows = content.images.filter(gone)
    ids = _ids_of(rows["first_id"].to_numpy(), rows["vectors"].to_numpy())
    content.nearest.remove(ids)
    content.images = content.images.filter(pc.invert(gone))
    if content.cells is not None:
        content.cells = content.cells.filter(pc.invert(pc.is_in(content.cells["id"], value_set=pa.array(ids))))


def _put_in(content: IndexContent, batches: Any, images: pa.Table) -> None:
    """Add the vectors of `batches`, and the images of `images` that have none."""
    new_images, new_cells = [content.images], [] if content.cells is None else [content.cells]
    batch: VectorBatch
    for batch in batches:
        first_ids = content.next_id + np.cumsum(batch.counts) - batch.counts
        ids = np.arange(content.next_id, content.next_id + len(batch.vectors))
        content.nearest.add(batch.vectors, ids)
        content.next_id += len(ids)
        columns = [batch.image_ids, batch.run_ids, pa.array(first_ids), pa.array(batch.counts)]
        new_images.append(pa.Table.from_arrays(columns, schema=IMAGES))
        if batch.cells is not None:
            new_cells.append(batch.cells.add_column(0, "id", pa.array(ids)).cast(CELLS))
    without = images.filter(pc.invert(pc.is_in(images["image_id"], value_set=_all_ids(new_images))))
    nothing = pa.array(np.zeros(len(without), np.int64))
    last = pa.array(np.full(len(without), content.next_id))
    columns = [without["image_id"], without["run_id"], last, nothing]
    content.images = pa.concat_tables([*new_images, pa.Table.from_arrays(columns, schema=IMAGES)]).combine_chunks()
    content.cells = pa.concat_tables(new_cells).combine_chunks() if new_cells else None


def _all_ids(tables: list[pa.Table]) -> pa.Array:
    return pa.concat_tables(tables)["image_id"].combine_chunks()


def _ids_of(first_ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """All ids of images whose ids begin at first_ids: (sum of counts,) int64."""
    begins = np.cumsum(counts) - counts
    return np.repeat(first_ids - begins, counts) + np.arange(int(counts.sum()))


def _warn_about_memory(nearest: NearestIndex, asked: IndexSettings, name: str, result: Result) -> None:
    size, budget = estimate_bytes(nearest.kind, len(nearest.ids), nearest.dimension), _memory_budget(asked)
    if size > budget:
        result.messages.append(
            f"The index {name} grew to {size / 1e9:.3g} GB, index.memory_gb is {budget / 1e9:.3g}: give another "
            "index.kind to build it anew."
        )


def _describe(result: Result, manifest: Manifest, status: str, started: float) -> Result:
    result.status = status
    result.kind, result.why, result.dimension = manifest.kind, manifest.why, manifest.dimension
    result.images, result.count, result.dead = manifest.images, manifest.count, manifest.dead
    result.memory_bytes = estimate_bytes(manifest.kind, manifest.count + manifest.dead, manifest.dimension)
    result.seconds = time.monotonic() - started
    return result
