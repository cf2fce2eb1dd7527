"""What is clustered: row groups of patches, or of images, and reading one of them on a worker."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.errors import RequestError
from pipelines.settings.sections import ClusterSettings, Config
from pipelines.store.parquet import open_parquet
from pipelines.store.schemas import scale_column
from pipelines.store.store import Store
from pipelines.store.table import READS_AT_ONCE, Table
from pipelines.store.vectors import decode


@dataclass(frozen=True)
class Unit:
    """A row group: what a worker reads at once, whichever worker it is.

    number: its place among all units, which seeds what is random in the unit. uri: of the Parquet file. rows:
    with those of images that are not asked for. images: image_id and run_id of the images of the file that are asked
    for.
    """

    number: int
    uri: str
    row_group: int
    rows: int
    images: pa.Table


@dataclass(frozen=True)
class Reading:
    """Which columns of a unit are read, and what becomes of them.

    of: patches or embeddings. column: the one that holds the vectors. half: vectors are held as float16. salient_above:
    only patches above this saliency are trained on; None for all.
    """

    of: str
    column: str
    half: bool
    salient_above: float | None
    options: storage.Options

    @classmethod
    def of_store(cls, store: Store, asked: ClusterSettings) -> Reading:
        patches = asked.of == "patches"
        return cls(
            of=asked.of,
            column=asked.descriptor if patches else "embedding",
            # exact where halves are stored, and far finer than the steps of int8; embeddings are stored as they are
            half=patches and store.config.store.dtype != "float32",
            salient_above=store.config.store.salient_threshold if asked.salient_only else None,
            options=store.config.storage.options,
        )


def check_store(store: Store, asked: ClusterSettings) -> None:
    """Raises RequestError for a store that lacks what is to be clustered."""
    store.requires("clustering", images=True)
    if asked.of == "embeddings":
        store.requires("cluster.of=embeddings", embedding=True, instead="cluster patches")
        if asked.salient_only:
            raise RequestError("cluster.salient_only is about patches, and cluster.of is embeddings: give one of them.")
        return
    descriptor = ("cluster.descriptor", asked.descriptor)
    store.requires("clustering patches", patches=True, descriptor=descriptor, instead="give --of embeddings")
    store.requires("cluster.salient_only", saliency=asked.salient_only)


def clustered_images(store: Store, asked: ClusterSettings) -> pa.Table:
    """image_id, run_id, shard of the images that have something to cluster, in key order."""
    return clustered_images_of(store.images, asked)


def clustered_images_of(table: Table, asked: ClusterSettings) -> pa.Table:
    """The same, of a table of images at any version."""
    images = table.read(["image_id", "run_id", "shard"])
    if asked.of == "patches":
        images = images.filter(pc.is_valid(images["shard"]))
    return images.sort_by("image_id").combine_chunks()


def digest(images: pa.Table) -> str:
    """A hash of the images and their extractions."""
    text = pc.binary_join_element_wise(images["image_id"], images["run_id"], "\0")
    content = hashlib.sha256()
    for value in text.to_pylist():
        content.update(value.encode() + b"\n")
    return content.hexdigest()


def list_units(store: Store, asked: ClusterSettings, images: pa.Table) -> list[Unit]:
    """Row groups that hold vectors of `images` (image_id, run_id, shard), in the order of their files.

    Raises JobError for a file that is gone.
    """
    table = store.patches if asked.of == "patches" else store.images
    wanted = _images_by_file(table, asked, images)

    def footer(path: str) -> list[int]:
        uri = storage.join(table.uri, path)
        with open_parquet(uri, table.options) as parquet:
            groups = parquet.metadata
            return [groups.row_group(index).num_rows for index in range(groups.num_row_groups)]

    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        rows_of = dict(zip(wanted, pool.map(footer, wanted), strict=True))
    groups = [(path, index, rows) for path in wanted for index, rows in enumerate(rows_of[path])]
    return [
        Unit(number, storage.join(table.uri, path), index, rows, wanted[path])
        for number, (path, index, rows) in enumerate(groups)
    ]


def _images_by_file(table: Table, asked: ClusterSettings, images: pa.Table) -> dict[str, pa.Table]:
    """File -> the images asked for in it. Patches lie in the files that images rows name."""
    pairs = images.select(["image_id", "run_id"])
    if asked.of == "patches":
        shards = pc.dictionary_encode(images["shard"].combine_chunks())
        order = np.argsort(np.asarray(shards.indices), kind="stable")
        counts = np.bincount(np.asarray(shards.indices), minlength=len(shards.dictionary))
        of_shard = np.split(order, np.cumsum(counts)[:-1])
        found = dict(zip(shards.dictionary.to_pylist(), of_shard, strict=True))
    else:
        ids = images["image_id"].to_pylist()
        spans = {
            path: range(bisect_left(ids, f.min_id), bisect_right(ids, f.max_id)) for path, f in table.files().items()
        }
        found = {path: np.array(span, np.int64) for path, span in spans.items() if span}
    # taken and not sliced: a slice would travel to workers with all that it is a part of
    return {path: pairs.take(pa.array(rows)) for path, rows in sorted(found.items())}


def read_vectors(unit: Unit, reading: Reading) -> tuple[np.ndarray, np.ndarray | None]:
    """(vectors (n, D) float16 or float32, which of them are trained on (n,) bool or None for all)."""
    columns = ["image_id", reading.column]
    with open_parquet(unit.uri, reading.options) as parquet:
        if scale_column(reading.column) in parquet.schema_arrow.names:
            columns.append(scale_column(reading.column))
        if reading.salient_above is not None:
            columns.append("saliency")
        rows = _wanted(parquet, unit, columns)
    vectors = _embeddings(rows) if reading.of == "embeddings" else decode(rows, reading.column)
    salient = None
    if reading.salient_above is not None:
        salient = rows["saliency"].to_numpy() > reading.salient_above
    return vectors.astype(np.float16) if reading.half else vectors, salient


def read_keys(unit: Unit, reading: Reading) -> pa.Table:
    """image_id, row, col, saliency, run_id of the vectors of a unit, in their order."""
    patches = reading.of == "patches"
    with open_parquet(unit.uri, reading.options) as parquet:
        rows = _wanted(parquet, unit, ["image_id", *(("row", "col", "saliency") if patches else ())])
    at = pc.index_in(rows["image_id"], value_set=unit.images["image_id"].combine_chunks())
    nothing = {"row": pa.int32(), "col": pa.int32(), "saliency": pa.float32()}
    return pa.table(
        {
            "image_id": rows["image_id"],
            **{name: rows[name] if patches else pa.nulls(len(rows), kind) for name, kind in nothing.items()},
            "run_id": unit.images["run_id"].combine_chunks().take(at.combine_chunks()),
        }
    )


def _wanted(parquet: pq.ParquetFile, unit: Unit, columns: list[str]) -> pa.Table:
    rows = parquet.read_row_group(unit.row_group, columns=columns)
    wanted = unit.images["image_id"].combine_chunks()
    return rows.filter(pc.is_in(rows["image_id"], value_set=wanted)).combine_chunks()


def _embeddings(rows: pa.Table) -> np.ndarray:
    values = [chunk.flatten().to_numpy() for chunk in rows["embedding"].chunks]
    return np.concatenate([np.zeros(0, np.float32), *values]).reshape(len(rows), -1 if len(rows) else 0)


def unit_random(unit: Unit, seed: int, rows: int) -> np.ndarray:
    """(rows,) uniform in 0..1: the same for a unit, whichever worker draws."""
    return np.random.default_rng([seed, unit.number]).random(rows)


def split_units(units: list[Unit], parts: int) -> list[list[Unit]]:
    """Units in `parts` stretches of about equally many rows; fewer where there are fewer units."""
    ends = np.cumsum([unit.rows for unit in units])
    if not len(ends):
        return []
    part = np.minimum((ends - 1) * parts // ends[-1], parts - 1)
    stretches = [[unit for unit, at in zip(units, part, strict=True) if at == index] for index in range(parts)]
    return [stretch for stretch in stretches if stretch]


def batches_of_units(units: list[Unit], rows: int) -> Iterator[list[Unit]]:
    """Units in batches of at most about `rows` rows, at least one unit each."""
    batch: list[Unit] = []
    held = 0
    for unit in units:
        if batch and held + unit.rows > rows:
            yield batch
            batch, held = [], 0
        batch.append(unit)
        held += unit.rows
    if batch:
        yield batch


def training_settings(store_config: Config, asked: ClusterSettings) -> dict[str, Any]:
    """The settings that decide which clusters come out."""
    settings = asked.model_dump(mode="json", exclude={"cache_gb"})
    if asked.salient_only:
        settings["salient_threshold"] = store_config.store.salient_threshold
    return settings
