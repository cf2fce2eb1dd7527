"""Whether the tables of a clustering agree with each other and with the model that they were made with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import JobError, counted
from pipelines.results.clusters import ClusterTables


def disagreements(tables: ClusterTables) -> Iterator[str]:
    """What is wrong with clusters/NAME, a sentence each.

    Images that were extracted again or removed since are no damage: `dinoray cluster --update` brings them up to date.
    """
    try:
        model = tables.model()
    except JobError as error:
        yield str(error)
        return
    centroids = tables.centroids.read(["cluster_id", "size", "centroid"])
    ids = sorted(centroids["cluster_id"].to_pylist())
    k = 0 if model is None else model.k
    if ids != list(range(k)):
        yield f"centroids has {counted(len(ids), 'row')}, its training made {counted(k, 'cluster')}"
        return
    if model is None:
        return
    lengths = set(pc.list_value_length(centroids["centroid"]).to_pylist())
    if lengths != {model.dimension}:
        yield f"centroids have {', '.join(map(str, sorted(lengths)))} values, its training made {model.dimension}"
    assigned = np.zeros(k, np.int64)
    owners: dict[tuple[str, str], str] = {}
    for path in tables.assignments.files():
        rows = tables.assignments.read_file(path, ["image_id", "row", "col", "cluster_id", "run_id"])
        clusters = rows["cluster_id"].to_numpy()
        if len(clusters) and not 0 <= clusters.min() <= clusters.max() < k:
            yield f"assignments: {path} names clusters {clusters.min()} to {clusters.max()}, but k is {k}"
            continue
        assigned += np.bincount(clusters, minlength=k)
        yield from _repeated_patches(rows, path)
        for image_id, run_id in _images(rows):
            if (other := owners.setdefault((image_id, run_id), path)) != path:
                yield f"assignments: {image_id} lies in {other} and in {path}"
    sizes = centroids.sort_by("cluster_id")["size"].to_numpy()
    for cluster in np.flatnonzero(sizes != assigned):
        yield f"cluster {cluster} has {counted(assigned[cluster], 'assignment')}, its row says {sizes[cluster]:,}"


def _repeated_patches(rows: pa.Table, path: str) -> Iterator[str]:
    cells = rows.group_by(["image_id", "row", "col"]).aggregate([("cluster_id", "count")])
    for cell in cells.filter(pc.greater(cells["cluster_id_count"], 1)).to_pylist():
        place = "" if cell["row"] is None else f" patch ({cell['row']}, {cell['col']})"
        yield f"assignments: {cell['image_id']}{place} is assigned {cell['cluster_id_count']} times in {path}"


def _images(rows: pa.Table) -> list[tuple[str, str]]:
    images = rows.group_by(["image_id", "run_id"]).aggregate([])
    return list(zip(images["image_id"].to_pylist(), images["run_id"].to_pylist(), strict=True))
