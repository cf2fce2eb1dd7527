"""Whether the tables of a clustering agree with each other and with the model that they were made with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import counted
from pipelines.results.clusters import ClusterTables
from pipelines.store.damage import DamagedResult
from pipelines.store.findings import CountAgain, Finding, RemoveFile, RemoveResult
from pipelines.store.parquet import DamagedFile


def disagreements(tables: ClusterTables) -> Iterator[Finding]:
    """What is wrong with clusters/NAME.

    Images that were extracted again or removed since are no damage: `dinoray cluster --update` brings them up to date.
    """
    path = tables.path

    def of_centroids(sentence: str) -> Finding:
        return Finding("rows", path, sentence, CountAgain(path))

    def of_assignments(file: str, sentence: str) -> Finding:
        table = tables.path_of("assignments")
        return Finding("rows", table, f"assignments: {sentence}", RemoveFile(table, file))

    try:
        model = tables.model()
    except (DamagedFile, DamagedResult) as error:
        yield Finding("result", path, str(error), RemoveResult(path))
        return
    centroids = tables.centroids.read(["cluster_id", "size", "centroid"])
    ids = sorted(centroids["cluster_id"].to_pylist())
    k = 0 if model is None else model.k
    if ids != list(range(k)):
        yield of_centroids(f"centroids has {counted(len(ids), 'row')}, its training made {counted(k, 'cluster')}")
        return
    if model is None:
        return
    lengths = set(pc.list_value_length(centroids["centroid"]).to_pylist())
    if lengths != {model.dimension}:
        shown = ", ".join(map(str, sorted(lengths, key=str)))
        yield of_centroids(f"centroids have {shown} values, its training made {model.dimension}")
    assigned = np.zeros(k, np.int64)
    owners: dict[tuple[str, str], str] = {}
    for file in tables.assignments.files():
        rows = tables.assignments.read_file(file, ["image_id", "row", "col", "cluster_id", "run_id"])
        clusters = rows["cluster_id"].to_numpy()
        if len(clusters) and not 0 <= clusters.min() <= clusters.max() < k:
            low, high = clusters.min(), clusters.max()
            yield of_assignments(file, f"{file} names clusters {low} to {high}, but k is {k}")
            continue
        assigned += np.bincount(clusters, minlength=k)
        for repeated in _repeated_patches(rows):
            yield of_assignments(file, f"{repeated} in {file}")
        for image_id, run_id in _images(rows):
            if (other := owners.setdefault((image_id, run_id), file)) != file:
                yield of_assignments(file, f"{image_id} lies in {other} and in {file}")
    sizes = centroids.sort_by("cluster_id")["size"].to_numpy()
    for cluster in np.flatnonzero(sizes != assigned):
        held = counted(assigned[cluster], "assignment")
        yield of_centroids(f"cluster {cluster} has {held}, its row says {sizes[cluster]:,}")


def _repeated_patches(rows: pa.Table) -> Iterator[str]:
    cells = rows.group_by(["image_id", "row", "col"]).aggregate([("cluster_id", "count")])
    for cell in cells.filter(pc.greater(cells["cluster_id_count"], 1)).to_pylist():
        place = "" if cell["row"] is None else f" patch ({cell['row']}, {cell['col']})"
        yield f"{cell['image_id']}{place} is assigned {cell['cluster_id_count']} times"


def _images(rows: pa.Table) -> list[tuple[str, str]]:
    images = rows.group_by(["image_id", "run_id"]).aggregate([])
    return list(zip(images["image_id"].to_pylist(), images["run_id"].to_pylist(), strict=True))
