"""The published k-means of co-segmentation: vectors of unit length, and a number of clusters chosen by the elbow rule.

"Deep ViT Features as Dense Visual Descriptors", section 4.2, as its published code does it. The k-means itself is a
function that callers may replace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MAX_CLUSTERS = 14
MAX_DISTANCE_BLOCK_VALUES = 16_000_000
# Unit vectors that are no farther apart, in the mean, are equal.
SQUARED_DISTANCE_BY_ROUNDING = 1e-9


class KMeansFunction(Protocol):
    """A k-means: points (n, D) float32, n >= k >= 1 -> centroids (k, D) float32."""

    def __call__(self, points: np.ndarray, k: int) -> np.ndarray: ...


@dataclass(frozen=True)
class FaissKMeans:
    """FAISS' k-means with the published code's settings, so with the same seed its clusters are the published ones.

    restarts: runs from other first centroids; the best is taken. points_per_cluster: where there are more than this
    many a cluster, they are sampled, with the seed. It runs on one thread: with so few points, threads would only wait
    for each other, and very long where other processes use the cores.
    """

    seed: int = 1234
    iterations: int = 300
    restarts: int = 10
    points_per_cluster: int = 256

    def __call__(self, points: np.ndarray, k: int) -> np.ndarray:
        import faiss

        kmeans = faiss.Kmeans(
            points.shape[1],
            k,
            niter=self.iterations,
            nredo=self.restarts,
            seed=self.seed,
            min_points_per_centroid=1,  # it would only warn
            max_points_per_centroid=self.points_per_cluster,
        )
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)
        try:
            kmeans.train(np.ascontiguousarray(points, np.float32))
        finally:
            faiss.omp_set_num_threads(threads)
        return np.array(kmeans.centroids)


@dataclass(frozen=True)
class ElbowClusters:
    """Clusters and how their number came about.

    centroids: (k, D) float32. objectives: (k,) float64, the mean squared distance with 1 to k clusters.
    note: what was unusual, or "".
    """

    centroids: np.ndarray
    objectives: np.ndarray
    note: str = ""


def cluster_by_elbow(
    training: np.ndarray,
    descriptors: Sequence[np.ndarray],
    elbow: float,
    kmeans: KMeansFunction,
    max_clusters: int = MAX_CLUSTERS,
) -> ElbowClusters:
    """The first number of clusters whose objective is above elbow times that of one cluster fewer.

    training: (n, D) float32 of unit length, n >= 1, what k-means sees. descriptors: arrays (..., D) over which the
    objective is taken; they are read once for every k, so a sequence may load them when asked.

    That number itself is used, not the one before, as published. Fewer training vectors than clusters, and vectors
    that are all the same, end the search earlier.
    """
    objectives: list[float] = []
    centroids = np.zeros((0, training.shape[1]), np.float32)
    for k in range(1, min(max_clusters, len(training)) + 1):
        centroids = kmeans(training, k)
        objectives.append(_mean_squared_distance(descriptors, centroids))
        if objectives[-1] <= SQUARED_DISTANCE_BY_ROUNDING:
            note = "all descriptors are the same" if k == 1 else f"there are only {k} different descriptors"
            return ElbowClusters(centroids, np.array(objectives), note)
        if k > 1 and objectives[-1] > elbow * objectives[-2]:
            return ElbowClusters(centroids, np.array(objectives))
    note = f"only {len(training)} descriptors to cluster" if len(training) < max_clusters else ""
    return ElbowClusters(centroids, np.array(objectives), note)


def unit_rows(descriptor: np.ndarray) -> np.ndarray:
    """Descriptors (..., D) of any floating-point type as rows of unit length, (n, D) float32; zeros stay zeros.

    Raises ValueError for values that are not finite.
    """
    rows = np.asarray(descriptor).reshape(-1, descriptor.shape[-1]).astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise ValueError(f"{(~np.isfinite(norms)).sum()} of {len(rows)} descriptors hold values that are not finite")
    return rows / np.where(norms > 0, norms, 1)


def nearest_centroids(rows: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row: labels (n,) int32 and squared distances (n,) float32; the first of equals.

    rows: (n, D) float32. centroids: (k, D) float32, k >= 1.
    """
    labels, distances = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    for block, squared in _distance_blocks(rows, centroids):
        nearest = squared.argmin(axis=1)
        labels[block] = nearest
        distances[block] = squared[np.arange(len(nearest)), nearest]
    return labels, distances


def squared_distances(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of rows (n, D) to centroids (k, D): (n, k) float32, never negative."""
    blocks = [squared for _, squared in _distance_blocks(rows, centroids)]
    return np.concatenate(blocks) if blocks else np.zeros((0, len(centroids)), np.float32)


def _distance_blocks(rows: np.ndarray, centroids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    lengths = np.einsum("kd,kd->k", centroids, centroids)
    size = max(1, MAX_DISTANCE_BLOCK_VALUES // len(centroids))
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        squared = np.einsum("nd,nd->n", block, block)[:, None] + lengths - 2 * (block @ centroids.T)
        yield slice(first, first + len(block)), np.maximum(squared, 0)


def _mean_squared_distance(descriptors: Sequence[np.ndarray], centroids: np.ndarray) -> float:
    total, count = 0.0, 0
    for descriptor in descriptors:
        rows = unit_rows(descriptor)
        total += float(nearest_centroids(rows, centroids)[1].sum(dtype=np.float64))
        count += len(rows)
    return total / count
