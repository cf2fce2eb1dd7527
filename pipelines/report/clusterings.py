"""The clusters that the images of a report lie in, and the patches of them that are typical of a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.results.clusters import ClusterTables
from pipelines.store.rows import rows_of

TYPICAL_PER_CLUSTER = 8
# Few, so that they show what images have in common.
TYPICAL_PER_IMAGE = 2


@dataclass(frozen=True)
class Typical:
    """A patch near its centroid (row, col of the stored grid), or a whole image (None)."""

    image_id: str
    row: int | None
    col: int | None
    distance: float


@dataclass(frozen=True)
class Clustering:
    """clusters/NAME as far as it is about some images.

    of: what is clustered, patches or images.
    grids: cluster_id of every patch, (rows, columns) int32, -1 where there is none; empty when images are clustered.
    shown: patches (or images) of each cluster among these images, most first. sizes: of each cluster in all.
    images: how many of these images have something of each cluster. typical: of each cluster, nearest first.
    """

    name: str
    of: str
    grids: dict[str, np.ndarray]
    shown: Counter[int]
    sizes: dict[int, int]
    images: Counter[int]
    typical: dict[int, list[Typical]] = field(default_factory=dict)

    @property
    def ranked(self) -> list[int]:
        """The clusters of these images, the largest there first."""
        return [cluster for cluster, _ in sorted(self.shown.items(), key=lambda item: (-item[1], item[0]))]


def read_clustering(name: str, tables: ClusterTables, grids: Mapping[str, tuple[int, int]]) -> Clustering | None:
    """The clusters of some images; None where none of them is assigned.

    grids: rows and columns of each image's patches, by image_id.
    """
    columns = ["image_id", "row", "col", "cluster_id", "distance"]
    rows = rows_of(tables.assignments, grids, columns)
    if not len(rows):
        return None
    sizes = tables.centroids.read(["cluster_id", "size"])
    about = dict(zip(sizes["cluster_id"].to_pylist(), sizes["size"].to_pylist(), strict=True))
    of = "images" if rows["row"].null_count else "patches"
    clusters = rows["cluster_id"].to_numpy()
    ids = np.array(rows["image_id"].to_pylist(), object)
    each = set(zip(clusters.tolist(), ids, strict=True))
    return Clustering(
        name,
        of,
        _grids(rows, ids, grids) if of == "patches" else {},
        Counter(clusters.tolist()),
        about,
        Counter(cluster for cluster, _ in each),
        _typical(rows),
    )


def _grids(rows: pa.Table, ids: np.ndarray, grids: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    row, col, cluster = (rows[name].to_numpy() for name in ("row", "col", "cluster_id"))
    found = {}
    for image_id in dict.fromkeys(ids):
        own = ids == image_id
        found[image_id] = np.full(grids[image_id], -1, np.int32)
        found[image_id][row[own], col[own]] = cluster[own]
    return found


def _typical(rows: pa.Table) -> dict[int, list[Typical]]:
    ordered = rows.sort_by([("cluster_id", "ascending"), ("distance", "ascending"), ("image_id", "ascending")])
    found: dict[int, list[Typical]] = {}
    taken: Counter[tuple[int, str]] = Counter()
    for row in ordered.to_pylist():
        own, key = found.setdefault(row["cluster_id"], []), (row["cluster_id"], row["image_id"])
        if len(own) < TYPICAL_PER_CLUSTER and taken[key] < TYPICAL_PER_IMAGE:
            taken[key] += 1
            own.append(Typical(row["image_id"], row["row"], row["col"], row["distance"]))
    return found
