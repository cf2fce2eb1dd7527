"""What a store says, whoever wrote it when and in how many files: every row of every table and index, without run ids
and times, to be compared with another store's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ops.nearest import search_all
from pipelines.results.all_kinds import StoredIndex, all_results
from pipelines.results.indices import ids_of, read_dead, read_manifest, read_parts, without_dead
from pipelines.settings.sections import Config
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.store import Store

# Sums of float32 come out a little different in another order.
TOLERANCE = 1e-4
PROBES = 3
_OF_RUNS = ("run_id", "run_id_a", "run_id_b", "set_version", "extracted_at", "failed_at", "shard", "uri", "message")
_FLOATS = (pa.float32(), pa.float64())


@dataclass
class Rows:
    """Rows of a table in one order, and their numbers: (rows, columns) float64."""

    keys: list[tuple[Any, ...]]
    numbers: np.ndarray

    def same_as(self, other: Rows) -> bool:
        return (
            self.keys == other.keys
            and self.numbers.shape == other.numbers.shape
            and np.allclose(self.numbers, other.numbers, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
        )


Contents = dict[str, Rows]


def contents_of(uri: str, config: Config) -> Contents:
    """All tables and indices of a store, as its newest snapshot has them, by their paths."""
    store = Store.open(uri, config)
    current = snapshot(store.log)
    runs = _runs(current)
    found = {name: _rows(_read(current, name), runs) for name in ("images", "patches", "failures")}
    for result in all_results(store):
        if isinstance(result, StoredIndex):
            found[result.path] = _of_index(store, result.name, runs)
            continue
        tables = {name: _read(current, f"{result.path}/{name}") for name in result.tables}
        if "centroids" in tables:
            tables = _in_order_of_centroids(tables)
        for name, rows in tables.items():
            found[f"{result.path}/{name}"] = _rows(rows, runs)
    return found


def differences(one: Contents, other: Contents) -> list[str]:
    """Paths of tables that say different things, or that only one store has."""
    return sorted(
        path
        for path in one.keys() | other.keys()
        if path not in one or path not in other or not one[path].same_as(other[path])
    )


def twice(found: Contents) -> list[str]:
    """Tables in which a row is there twice."""
    return sorted(path for path, rows in found.items() if len(set(rows.keys)) < len(rows.keys))


def _runs(current: Snapshot) -> dict[str, str]:
    """image_id -> the run that extracted it."""
    rows = _read(current, "images")
    return dict(zip(rows["image_id"].to_pylist(), rows["run_id"].to_pylist(), strict=True))


def _read(current: Snapshot, path: str) -> pa.Table:
    table = current.table(path)
    assert table is not None, path
    return table.read(table.schema.names)


def _rows(rows: pa.Table, runs: dict[str, str]) -> Rows:
    """A row is known by what is neither a float nor of a run, and by whether it was made from the images there are."""
    keys, numbers = [], []
    columns: dict[str, list[Any]] = {}
    for name in rows.column_names:
        column = rows[name]
        if name in _OF_RUNS:
            continue
        if pa.types.is_list(column.type):
            numbers.append(_vectors(column))
        elif column.type in _FLOATS:
            numbers.append(column.to_numpy().astype(np.float64)[:, None])
        else:
            columns[name] = column.to_pylist()
    for image, run in (("image_id", "run_id"), ("image_a", "run_id_a"), ("image_b", "run_id_b")):
        if run in rows.column_names and image in rows.column_names:
            of_images = zip(rows[image].to_pylist(), rows[run].to_pylist(), strict=True)
            columns[f"{run} is current"] = [runs.get(one) == run_id for one, run_id in of_images]
    if "mask_png" in columns:
        columns["mask_png"] = [hashlib.sha256(one).hexdigest() for one in columns["mask_png"]]
    keys = list(zip(*columns.values(), strict=True))
    order = sorted(range(len(keys)), key=lambda at: tuple(map(str, keys[at])))
    values = np.concatenate([np.zeros((len(rows), 0)), *numbers], axis=1)
    return Rows([keys[at] for at in order], values[order])


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    """(rows, D) float64 of a list column; (rows, 0) of one without values."""
    values = pc.list_flatten(column).to_numpy().astype(np.float64)
    return values.reshape(len(column), -1) if len(column) else np.zeros((0, 0))


def _in_order_of_centroids(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Clusters by their centroids, since another order of the same vectors numbers them in another way."""
    centroids = tables["centroids"]
    if not len(centroids):
        return tables
    vectors = _vectors(centroids["centroid"]).round(1)
    order = np.lexsort(vectors.T[::-1])
    numbers = dict(zip(np.array(centroids["cluster_id"])[order].tolist(), range(len(order)), strict=True))

    def renumbered(rows: pa.Table) -> pa.Table:
        ids = pa.array([numbers[one] for one in rows["cluster_id"].to_pylist()], pa.int32())
        return rows.set_column(rows.schema.get_field_index("cluster_id"), "cluster_id", ids)

    return {name: renumbered(rows) for name, rows in tables.items()}


def _of_index(store: Store, name: str, runs: dict[str, str]) -> Rows:
    """The images of an index, and how like some fixed vectors those of each are."""
    manifest = read_manifest(store, name)
    assert manifest is not None
    dead = read_dead(store, name, manifest)
    parts = read_parts(store, name, manifest, dead)
    probes = np.random.default_rng(0).random((PROBES, manifest.dimension)).astype(np.float32)
    similarities, ids = search_all([part.nearest for part in parts], probes, manifest.count)
    alike = [dict(zip(row.tolist(), of.tolist(), strict=True)) for row, of in zip(ids, similarities, strict=True)]
    found = sorted(_indexed(parts, dead, runs))
    numbers = [[one[number] for one in alike] for _, _, number in found]
    return Rows([(image_id, current) for image_id, current, _ in found], np.array(numbers).reshape(-1, PROBES))


def _indexed(parts: Any, dead: pa.Table, runs: dict[str, str]) -> Iterator[tuple[str, bool, int]]:
    for part in parts:
        rows = without_dead(part.images, dead)
        for row, number in zip(rows.to_pylist(), ids_of(rows), strict=True):
            yield row["image_id"], runs.get(row["image_id"]) == row["run_id"], int(number)
