"""The index: recall against exact search for every kind, and what adding 1,000 vectors to 100,000 costs.

make bench        (this part: about two minutes)
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.results import Row, report
from dino_ops.nearest import Kind, NearestIndex, training_size, unit

COUNT, ADDED, QUERIES, DIMENSION, TOP = 100_000, 1_000, 500, 64, 10
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivfpq")


def main() -> None:
    vectors = _clustered(COUNT + ADDED + QUERIES)
    rows = [row for kind in KINDS for row in one_kind(kind, vectors)]
    report(f"index of {COUNT:,} vectors of {DIMENSION} values", rows)


def one_kind(kind: Kind, vectors: np.ndarray) -> list[Row]:
    """Recall of a kind, and an addition in parts of a rebuild. Every rebuild trains and adds all vectors."""
    held, queries = vectors[: COUNT + ADDED], vectors[COUNT + ADDED :]
    started = time.perf_counter()
    index = NearestIndex.create(kind, DIMENSION, COUNT, held[: training_size(COUNT)])
    index.add(held[:COUNT], np.arange(COUNT))
    build = time.perf_counter() - started
    started = time.perf_counter()
    index.add(held[COUNT:], np.arange(COUNT, COUNT + ADDED))
    addition = time.perf_counter() - started
    started = time.perf_counter()
    _, found = index.search(queries, TOP)
    search = time.perf_counter() - started
    exact = np.argsort(-(queries @ held.T), axis=1)[:, :TOP]
    recall = np.mean([len(set(a) & set(b)) / TOP for a, b in zip(found, exact, strict=True)])
    figures = f"{QUERIES / search:,.0f} queries/s"
    return [
        Row(f"{kind}: recall@{TOP}", float(recall), ">= 0.95", figures),
        Row(f"{kind}: {ADDED:,} added / rebuild", addition / build, "<= 0.05", f"{addition:.2f} s and {build:.2f} s"),
    ]


def _clustered(count: int) -> np.ndarray:
    """Unit vectors around centres, 50 each: (count, DIMENSION) float32."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((count // 50, DIMENSION), np.float32)
    noise = 0.6 * generator.standard_normal((count, DIMENSION), np.float32)
    return unit(centres[generator.integers(0, len(centres), count)] + noise)


if __name__ == "__main__":
    main()
