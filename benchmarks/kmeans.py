"""k-means in one process: assignment against bare matrix products, an iteration and its result against faiss.

make bench        (this part: about a minute on two idle cores)

Work on 1,000,000 vectors is measured on equal pieces of them, ours and theirs in turn, and the least time of each
piece's rounds counts: other programs on the machine then disturb both alike, and little. A pass costs the same for
every piece, so the figures are those of the whole.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.results import Row, report
from dino_ops.kmeans import Codebook, LloydPass, PartialSums, kmeans, seed, update
from pipelines.running.cpus import available_cpus

COUNT, DIMENSION, K = 1_000_000, 384, 1_024
# A call takes a second or less, so that some of the rounds run undisturbed.
ROWS_PER_CALL = 50_000
# In a round every tenth call is measured.
ROUNDS = 3
# The fastest of these is the machine's rate.
ROWS_PER_BARE_PRODUCT = (512, 1_024, 4_096)
INERTIA_COUNT, INERTIA_K, ITERATIONS = 60_000, 256, 20


def main() -> None:
    torch.set_num_threads(available_cpus())
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(available_cpus())
    vectors = _clustered(COUNT)
    report(
        f"k-means of {COUNT:,} vectors of {DIMENSION} values, k = {K:,}",
        [*speed(vectors, faiss), *seeding(vectors), *inertia(vectors[:INERTIA_COUNT], faiss)],
    )


def speed(vectors: np.ndarray, faiss: Any) -> list[Row]:
    """An assignment pass in parts of the product rate, and an iteration in parts of the best other one."""
    centroids = vectors[:K].astype(np.float64)
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    spherical, euclidean = Codebook(unit, spherical=True), Codebook(centroids, spherical=False)
    single = torch.from_numpy(centroids.astype(np.float32))
    # The same rows every time, already converted.
    half = [torch.from_numpy(vectors[:ROWS_PER_CALL]).half()]
    best = _least_seconds(
        vectors,
        {
            **{f"products of {rows}": _products(single, rows) for rows in ROWS_PER_BARE_PRODUCT},
            "assign, cosine": spherical.assign,
            "assign, Euclidean": euclidean.assign,
            "iteration, cosine": LloydPass(spherical).add,
            "iteration, Euclidean": LloydPass(euclidean).add,
            "iteration, cosine, float16": lambda _: LloydPass(spherical).add(half[0]),
            "faiss": _faiss_iteration(single.numpy(), faiss),
            "torch": _torch_iteration(single),
        },
    )
    pieces = COUNT / ROWS_PER_CALL
    product = min(best[f"products of {rows}"] for rows in ROWS_PER_BARE_PRODUCT)
    rate = 2 * ROWS_PER_CALL * DIMENSION * K / product / 1e9
    other = min("faiss", "torch", key=best.__getitem__)
    # What is done once an iteration, whatever the number of vectors.
    started = time.perf_counter()
    update(unit, LloydPass(spherical).total() + PartialSums.zeros(K, DIMENSION), spherical=True)
    once = time.perf_counter() - started
    rows = [
        Row(
            f"{name} / product rate", product / best[name], ">= 0.6", f"{pieces * best[name]:.2f} s; {rate:.0f} GFLOP/s"
        )
        for name in ("assign, cosine", "assign, Euclidean")
    ]
    for name in ("iteration, cosine", "iteration, Euclidean", "iteration, cosine, float16"):
        ours, theirs = pieces * best[name] + once, pieces * best[other]
        figures = f"{ours:.2f} s; faiss {pieces * best['faiss']:.2f}, torch {pieces * best['torch']:.2f}"
        rows.append(Row(f"{name} / {other}", ours / theirs, "<= 1.3", figures))
    return rows


def seeding(vectors: np.ndarray) -> list[Row]:
    """k-means++ on 32 vectors for each cluster, in parts of an iteration over all vectors' products."""
    sample = np.ascontiguousarray(vectors[: 32 * K])
    started = time.perf_counter()
    centroids = seed(sample, K, spherical=True, seed=0)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    torch.from_numpy(sample).double() @ torch.from_numpy(centroids).T
    product = time.perf_counter() - started
    return [
        Row("k-means++ / one float64 product", seconds / product, "", f"{seconds:.2f} s for {len(sample):,} vectors")
    ]


def inertia(vectors: np.ndarray, faiss: Any) -> list[Row]:
    """Ours in parts of faiss.Kmeans', from the same first centroids, after the same number of iterations."""
    rows = []
    for spherical in (True, False):
        held = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if spherical else vectors
        first = seed(held[: 32 * INERTIA_K], INERTIA_K, spherical=spherical, seed=0)
        theirs = faiss.Kmeans(
            DIMENSION, INERTIA_K, niter=ITERATIONS, spherical=spherical, max_points_per_centroid=INERTIA_COUNT
        )
        theirs.train(held, init_centroids=first.astype(np.float32))
        found, _ = theirs.index.search(held, 1)
        objective = float((1 - found).sum(dtype=np.float64) if spherical else found.sum(dtype=np.float64))
        ours = kmeans(held, INERTIA_K, spherical=spherical, iterations=ITERATIONS, tolerance=0, centroids=first)
        name = f"inertia / faiss.Kmeans', {'cosine' if spherical else 'Euclidean'}"
        rows.append(Row(name, ours.inertia / objective, "<= 1.005", f"{ours.inertia:.6g} and {objective:.6g}"))
    return rows


def _least_seconds(vectors: np.ndarray, ways: dict[str, Callable[[torch.Tensor], object]]) -> dict[str, float]:
    """The shortest time that each way took for a piece."""
    best = dict.fromkeys(ways, np.inf)
    for _ in range(ROUNDS):
        for first in range(0, COUNT, 10 * ROWS_PER_CALL):
            piece = torch.from_numpy(vectors[first : first + ROWS_PER_CALL])
            for name, way in ways.items():
                started = time.perf_counter()
                way(piece)
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def _products(centroids: torch.Tensor, rows: int) -> Callable[[torch.Tensor], None]:
    scores = torch.empty(rows, len(centroids))

    def multiply(piece: torch.Tensor) -> None:
        for block in piece.split(rows):
            torch.mm(block, centroids.T, out=scores[: len(block)])

    return multiply


def _faiss_iteration(centroids: np.ndarray, faiss: Any) -> Callable[[torch.Tensor], None]:
    """An iteration of faiss.Kmeans on a piece: it starts from centroids, so training has nothing else to do."""

    def iterate(piece: torch.Tensor) -> None:
        clustering = faiss.Clustering(DIMENSION, K)
        clustering.niter, clustering.max_points_per_centroid = 1, ROWS_PER_CALL
        clustering.min_points_per_centroid = 1
        faiss.copy_array_to_vector(centroids.ravel(), clustering.centroids)
        clustering.train(piece.numpy(), faiss.IndexFlatL2(DIMENSION))

    return iterate


def _torch_iteration(centroids: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """As one would write it: products, argmax, index_add_, all in float32."""
    half_squares = centroids.square().sum(dim=1) / 2

    def iterate(piece: torch.Tensor) -> None:
        sums, sizes = torch.zeros_like(centroids), torch.zeros(len(centroids))
        for block in piece.split(1_024):
            labels = torch.addmm(half_squares, block, centroids.T, beta=-1).argmax(dim=1)
            sums.index_add_(0, labels, block)
            sizes += torch.bincount(labels, minlength=len(centroids))

    return iterate


def _clustered(count: int) -> np.ndarray:
    """Vectors around twice as many centres as there are clusters: (count, DIMENSION) float32."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((2 * K, DIMENSION), np.float32)
    vectors = generator.standard_normal((count, DIMENSION), np.float32)
    for rows in np.array_split(np.arange(count), 20):
        vectors[rows] += centres[generator.integers(0, len(centres), len(rows))]
    return vectors


if __name__ == "__main__":
    main()
