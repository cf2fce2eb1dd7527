"""k-means: the update between two passes over the data, and the whole of it for data in memory.

Pieces for many workers: `seed` on a sample, then in every iteration each worker adds its vectors to a `LloydPass`
(or calls `assign_and_sum`), PartialSums are added up, and `update` gives the next centroids. What spherical means, how
ties are decided and why workers do not matter: see `kmeans_assignment`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dino_ops.kmeans_assignment import Codebook as Codebook
from dino_ops.kmeans_assignment import LloydPass as LloydPass
from dino_ops.kmeans_assignment import PartialSums as PartialSums
from dino_ops.kmeans_assignment import Vectors as Vectors
from dino_ops.kmeans_assignment import as_tensor
from dino_ops.kmeans_assignment import assign as assign
from dino_ops.kmeans_assignment import assign_and_sum as assign_and_sum
from dino_ops.kmeans_assignment import partial_sums as partial_sums
from dino_ops.kmeans_seeding import seed as seed
from dino_ops.kmeans_seeding import seed_within as seed_within

SEEDING_VECTORS_PER_CLUSTER = 256
SPLIT_STEP_PER_RMS_DISTANCE = 0.1
# A cluster with less inertia holds identical vectors; the rest is rounding.
ROUNDING_INERTIA_PER_SQUARED_LENGTH = 1e-10
# The vectors of a cluster whose sum is shorter cancel each other out.
ROUNDING_LENGTH_PER_VECTOR = 1e-12


@dataclass(frozen=True)
class Update:
    """The centroids of the next iteration.

    centroids: (k, D) float64. reseeded: how many empty clusters were given half of another. shift: the farthest that a
    centroid moved, in parts of the root mean squared distance of vectors from their centroids.
    """

    centroids: np.ndarray
    reseeded: int
    shift: float


@dataclass(frozen=True)
class KMeans:
    """Clusters of n vectors.

    centroids: (k', D) float64; k' is less than k where fewer vectors are distinct. labels: (n,) int64. distances: (n,)
    float32. sizes: (k',) int64. inertia: of these labels. iterations: updates done. converged: whether they stopped
    since centroids hardly moved.
    """

    centroids: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    sizes: np.ndarray
    inertia: float
    iterations: int
    converged: bool


def update(
    centroids: np.ndarray,
    total: PartialSums,
    *,
    spherical: bool,
    seed: int = 0,
    iteration: int = 0,
    offsets: np.ndarray | None = None,
) -> Update:
    """Means of all clusters; empty ones take half of the cluster with the largest inertia.

    centroids: (k, D) float64, those that the vectors were compared with. total: of all vectors. offsets: as in
    Codebook; an empty cluster then takes from its own parent.

    A cluster is split as in faiss, by moving two copies of its centroid apart, so no vector has to travel; the
    direction is random and depends on seed, iteration and cluster alone. A cluster of identical vectors cannot be
    split: where nothing can, an empty cluster keeps its centroid and stays empty.
    """
    full = total.sizes > 0
    sizes = np.maximum(total.sizes, 1)
    lengths = np.linalg.norm(total.sums, axis=1)
    if spherical:
        full &= lengths > ROUNDING_LENGTH_PER_VECTOR * sizes
        scale, fallen = np.maximum(lengths, 1e-300), lengths - (total.sums * centroids).sum(axis=1)
    else:
        scale, fallen = sizes, np.zeros(0)
    moved = np.where(full[:, None], total.sums / scale[:, None], centroids)
    apart = np.linalg.norm(moved - centroids, axis=1)
    if not spherical:
        fallen = sizes * apart**2
    left = np.where(full, total.inertia - fallen, 0)
    left[left <= ROUNDING_INERTIA_PER_SQUARED_LENGTH * lengths**2 / sizes] = 0
    shift = _shift(apart, total, centroids, spherical)
    reseeded = 0
    for empty, rich, inertia in _splits(total.sizes, left, offsets):
        spread = np.sqrt(inertia * (2 if spherical else 1))
        way = np.random.default_rng((seed, iteration, empty)).standard_normal(centroids.shape[1])
        step = SPLIT_STEP_PER_RMS_DISTANCE * spread * way / np.linalg.norm(way)
        moved[empty], moved[rich] = moved[rich] - step, moved[rich] + step
        reseeded += 1
    if spherical:
        moved /= np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-300)
    return Update(moved, reseeded, shift)


def kmeans(
    vectors: Vectors,
    k: int,
    *,
    spherical: bool = True,
    iterations: int = 50,
    seed: int = 0,
    tolerance: float = 1e-4,
    centroids: np.ndarray | None = None,
) -> KMeans:
    """k clusters of vectors in memory, (n, D) floating point, tensor on any device or array.

    iterations: at most. tolerance: of Update.shift, at which they stop. centroids: (k, D), to start from instead of
    k-means++. Without vectors there are no centroids; with fewer distinct vectors than k, a centroid for each.
    """
    if centroids is None:
        sample = _some(as_tensor(vectors), SEEDING_VECTORS_PER_CLUSTER * k, seed)
        centroids = _seed(sample, k, spherical=spherical, seed=seed)
    device = vectors.device if isinstance(vectors, torch.Tensor) else "cpu"
    done, converged = 0, len(vectors) == 0
    while done < iterations and not converged:
        total = assign_and_sum(vectors, centroids, spherical=spherical)
        step = update(centroids, total, spherical=spherical, seed=seed, iteration=done)
        centroids, done = step.centroids, done + 1
        converged = step.reseeded == 0 and step.shift <= tolerance
    codebook = Codebook(centroids, spherical=spherical, device=device)
    labels, distances = (part.cpu().numpy() for part in codebook.assign(vectors))
    each = distances.astype(np.float64)
    return KMeans(
        centroids,
        labels,
        distances,
        sizes=np.bincount(labels, minlength=len(centroids)),
        inertia=float(each.sum() if spherical else each @ each),
        iterations=done,
        converged=converged,
    )


def choose_k(
    sample: Vectors,
    *,
    elbow: float,
    most: int,
    spherical: bool,
    seed: int = 0,
    iterations: int = 100,
    repeats: int = 3,
) -> tuple[int, list[float]]:
    """The number of clusters by the elbow rule, and the objectives that were compared.

    For k = 1, 2, ... the objective is the mean inertia of a vector, the least of `repeats` runs. The first k of at
    least 2 whose objective is more than `elbow` times the one before is taken; without one, `most`.
    """
    objectives: list[float] = []
    for k in range(1, most + 1):
        runs = (
            kmeans(sample, k, spherical=spherical, iterations=iterations, seed=seed + run)
            for run in range(repeats if k > 1 else 1)
        )
        objectives.append(min(run.inertia for run in runs) / max(1, len(sample)))
        if k > 1 and objectives[-1] > elbow * objectives[-2]:
            return k, objectives
    return most, objectives


# Functions here have an argument of the same name.
_seed = seed


def _shift(apart: np.ndarray, total: PartialSums, centroids: np.ndarray, spherical: bool) -> float:
    if not apart.any():
        return 0.0
    mean_square = total.inertia.sum() * (2 if spherical else 1) / max(1, total.sizes.sum())
    # Identical vectors have no spread: what is left of it is rounding, as is the movement.
    rounding = 1e-6 * np.linalg.norm(centroids, axis=1).max()
    return float(apart.max() / max(np.sqrt(mean_square), rounding))


def _splits(
    sizes: np.ndarray, inertia: np.ndarray, offsets: np.ndarray | None
) -> Iterator[tuple[int, int, np.float32]]:
    """Empty clusters, the cluster that each takes half of, and the mean inertia of its vectors.

    The largest inertia comes first, of equals the lowest id. A half counts as half the size and inertia.
    """
    for first, last in [(0, len(sizes))] if offsets is None else itertools.pairwise(offsets):
        empty = first + np.flatnonzero(sizes[first:last] == 0)
        if not len(empty):
            continue
        # As float32: sums in another order should not reverse clusters that are equally good.
        mean = (inertia / np.maximum(sizes, 1)).astype(np.float32)
        rich = [(-np.float32(inertia[c]), c, int(sizes[c]), mean[c]) for c in range(first, last) if inertia[c] > 0]
        heapq.heapify(rich)
        for cluster in empty.tolist():
            if not rich:
                break
            negative, largest, size, apart = heapq.heappop(rich)
            yield cluster, largest, apart
            if size > 3:  # smaller halves cannot be halved again
                heapq.heappush(rich, (negative / 2, largest, size // 2, apart))
                heapq.heappush(rich, (negative / 2, cluster, size // 2, apart))


def _some(vectors: torch.Tensor, most: int, seed: int) -> torch.Tensor:
    if len(vectors) <= most:
        return vectors
    rows = np.sort(np.random.default_rng(seed).choice(len(vectors), most, replace=False))
    return vectors[torch.from_numpy(rows).to(vectors.device)]
