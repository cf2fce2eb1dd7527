"""Size, inertia and votes of clusters, out of rows of their assignments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Counting:
    """How statistics are taken.

    spherical: distances are 1 - cosine and count once, else they count squared. salient_above: an image votes for a
    cluster when the mean saliency of its patches in the cluster is above this.
    """

    k: int
    spherical: bool
    salient_above: float


@dataclass(frozen=True)
class Statistics:
    """Statistics of k clusters; they add up over files of whole images.

    sizes: (k,) int64. inertia: (k,) float64. votes: (k,) int64, images in which the cluster is salient (Amir et al.
    2021, section 4.2); 0 where there is no saliency.
    """

    sizes: np.ndarray
    inertia: np.ndarray
    votes: np.ndarray

    @classmethod
    def zeros(cls, k: int) -> Statistics:
        return cls(np.zeros(k, np.int64), np.zeros(k), np.zeros(k, np.int64))

    @classmethod
    def of(cls, assignments: pa.Table, counting: Counting) -> Statistics:
        """Statistics of rows with image_id, cluster_id, distance, saliency; an image's rows are all there."""
        k = counting.k
        clusters = assignments["cluster_id"].to_numpy()
        distances = assignments["distance"].to_numpy().astype(np.float64)
        per_image = assignments.group_by(["image_id", "cluster_id"]).aggregate([("saliency", "mean")])
        salient = pc.fill_null(pc.greater(per_image["saliency_mean"], counting.salient_above), False)
        return cls(
            sizes=np.bincount(clusters, minlength=k),
            inertia=np.bincount(clusters, distances if counting.spherical else distances**2, minlength=k),
            votes=np.bincount(per_image["cluster_id"].filter(salient).to_numpy(), minlength=k),
        )

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.sizes + other.sizes, self.inertia + other.inertia, self.votes + other.votes)

    def __sub__(self, other: Statistics) -> Statistics:
        return Statistics(self.sizes - other.sizes, self.inertia - other.inertia, self.votes - other.votes)
