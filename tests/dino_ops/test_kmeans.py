"""k-means against a float64 loop, scikit-learn and faiss; the same whatever the blocks, the parts and their order."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ScikitKMeans

from dino_ops.kmeans import (
    PartialSums,
    Update,
    assign,
    assign_and_sum,
    choose_k,
    kmeans,
    seed,
    update,
)

METRICS = pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])


def directions(vectors: np.ndarray) -> np.ndarray:
    wide = np.asarray(vectors, np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def blobs(count: int, dimension: int, clusters: int, spread: float = 0.5, number: int = 0) -> np.ndarray:
    generator = np.random.default_rng(number)
    centres = generator.standard_normal((clusters, dimension))
    noise = spread * generator.standard_normal((count, dimension))
    return (centres[generator.integers(0, clusters, count)] + noise).astype(np.float32)


def tied(count: int, dimension: int = 12) -> np.ndarray:
    """Coarse vectors of which many are equal, mirrored or equally far from two others."""
    generator = np.random.default_rng(7)
    coarse = generator.integers(-2, 3, (count, dimension)).astype(np.float16) / 4
    coarse[count // 2 : count // 2 + count // 4] = coarse[: count // 4]
    coarse[-count // 8 :] = -coarse[: count // 8]
    coarse[:, 0] += np.float16(1.5)
    return coarse


def lloyd(vectors: np.ndarray, centroids: np.ndarray, iterations: int, spherical: bool) -> tuple[np.ndarray, ...]:
    """The textbook's loop in float64: centroids, labels under them, inertia."""
    points = directions(vectors) if spherical else vectors.astype(np.float64)
    for step in range(iterations + 1):
        squared = np.array([[((x - c) ** 2).sum() for c in centroids] for x in points])
        labels = squared.argmin(axis=1)
        if step == iterations:
            inertia = squared.min(axis=1).sum() / (2 if spherical else 1)
            return centroids, labels, inertia
        means = np.array([points[labels == c].mean(axis=0) for c in range(len(centroids))])
        centroids = directions(means) if spherical else means
    raise AssertionError


def iterate(
    vectors: np.ndarray,
    centroids: np.ndarray,
    iterations: int,
    spherical: bool,
    parts: int = 1,
    block_rows: int | None = None,
    merged: Callable[[list[PartialSums]], list[PartialSums]] = lambda parts: parts,
) -> list[Update]:
    """Lloyd's iterations as workers do them, each with its part of the vectors."""
    steps = []
    for iteration in range(iterations):
        sums = [
            assign_and_sum(part, centroids, spherical=spherical, block_rows=block_rows)
            for part in np.array_split(vectors, parts)
        ]
        total = sum(merged(sums), PartialSums.zeros(*centroids.shape))
        steps.append(update(centroids, total, spherical=spherical, seed=3, iteration=iteration))
        centroids = steps[-1].centroids
    return steps


@METRICS
@pytest.mark.parametrize("iterations", [0, 1, 8])
def test_is_the_textbook_loop(spherical: bool, iterations: int) -> None:
    vectors = blobs(300, 10, 6)
    first = seed(vectors, 7, spherical=spherical, seed=1)
    centroids, labels, inertia = lloyd(vectors, first, iterations, spherical)
    found = kmeans(vectors, 7, spherical=spherical, iterations=iterations, tolerance=0, centroids=first)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-9)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.sizes, np.bincount(labels, minlength=7))
    assert found.inertia == pytest.approx(inertia, rel=1e-6)


def test_agrees_with_scikit_learn() -> None:
    vectors = blobs(4_000, 16, 12, spread=0.9)
    first = seed(vectors, 12, spherical=False, seed=0)
    theirs = ScikitKMeans(12, init=first, n_init=1, max_iter=300, tol=0).fit(vectors.astype(np.float64))
    ours = kmeans(vectors, 12, spherical=False, iterations=300, tolerance=0, centroids=first)
    np.testing.assert_array_equal(ours.labels, theirs.labels_)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-9)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-6)


@METRICS
def test_inertia_is_that_of_faiss(spherical: bool) -> None:
    vectors = blobs(6_000, 32, 40, spread=1.0)
    if spherical:
        vectors = directions(vectors).astype(np.float32)
    first = seed(vectors, 30, spherical=spherical, seed=0)
    theirs = faiss.Kmeans(32, 30, niter=15, spherical=spherical, max_points_per_centroid=10**6)
    theirs.train(vectors, init_centroids=first.astype(np.float32))
    nearest = (directions(vectors) @ theirs.centroids.T).max(axis=1) if spherical else None
    objective = (1 - nearest).sum() if spherical else theirs.index.search(vectors, 1)[0].sum()
    ours = kmeans(vectors, 30, spherical=spherical, iterations=15, tolerance=0, centroids=first)
    assert ours.inertia == pytest.approx(objective, rel=1e-3)


@METRICS
@pytest.mark.parametrize("vectors", [tied(240), blobs(240, 24, 9).astype(np.float16)], ids=["tied", "blobs"])
def test_blocks_parts_and_order_change_nothing(spherical: bool, vectors: np.ndarray) -> None:
    """24 iterations: a single row decided otherwise would send them elsewhere."""
    first = seed(vectors, 25, spherical=spherical, seed=2)
    first[20:] = first[:5]  # equal centroids: ties everywhere, and clusters that run empty
    expected = iterate(vectors, first, 24, spherical)
    assert expected[0].reseeded
    labels, _ = assign(vectors, expected[-1].centroids, spherical=spherical)
    generator = np.random.default_rng(0)
    for parts, block_rows in [(1, 1), (1, 7), (2, 64), (4, 7), (4, 1000), (3, None)]:
        found = iterate(
            vectors,
            first,
            24,
            spherical,
            parts,
            block_rows,
            merged=lambda sums: [sums[i] for i in generator.permutation(len(sums))],
        )
        assert [step.reseeded for step in found] == [step.reseeded for step in expected]
        np.testing.assert_allclose(found[-1].centroids, expected[-1].centroids, atol=1e-9)
        again, _ = assign(vectors, found[-1].centroids, spherical=spherical, block_rows=block_rows)
        assert torch.equal(again, labels)


@METRICS
def test_another_library_of_products_changes_nothing(spherical: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products off by several units in the last place, as another machine's would be."""
    vectors = tied(480)
    first = seed(vectors, 25, spherical=spherical, seed=2)
    first[20:] = first[:5]
    expected = iterate(vectors, first, 24, spherical)
    product, generator = torch.addmm, torch.Generator().manual_seed(0)

    def inexact(bias: torch.Tensor, block: torch.Tensor, matrix: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        found = product(bias, block, matrix, **kwargs)
        if found.dtype == torch.float32:
            lengths = torch.linalg.vector_norm(block, dim=1)[:, None] * torch.linalg.vector_norm(matrix, dim=0)
            found += 5e-7 * lengths * (2 * torch.rand(found.shape, generator=generator) - 1)
        return found

    monkeypatch.setattr(torch, "addmm", inexact)
    found = iterate(vectors, first, 24, spherical)
    np.testing.assert_allclose(found[-1].centroids, expected[-1].centroids, atol=1e-9)
    assert [step.reseeded for step in found] == [step.reseeded for step in expected]


@METRICS
def test_order_of_rows_changes_nothing(spherical: bool) -> None:
    vectors = tied(800)
    first = seed(vectors, 20, spherical=spherical, seed=5)
    shuffled = vectors[np.random.default_rng(1).permutation(800)]
    a, b = (iterate(rows, first, 20, spherical)[-1].centroids for rows in (vectors, shuffled))
    np.testing.assert_allclose(a, b, atol=1e-9)


@METRICS
def test_empty_clusters_take_half_of_the_largest(spherical: bool) -> None:
    vectors = blobs(2_000, 8, 10, spread=0.2)
    far = np.tile(vectors[:1].astype(np.float64), (10, 1))  # all equal: nine of ten start empty
    far = directions(far) if spherical else far
    steps = iterate(vectors, far, 40, spherical)
    assert steps[0].reseeded == 9
    found = kmeans(vectors, 10, spherical=spherical, centroids=far, iterations=40)
    assert (found.sizes > 0).all()
    one = kmeans(vectors, 1, spherical=spherical)
    good = kmeans(vectors, 10, spherical=spherical, seed=1)
    assert found.inertia < good.inertia + 0.25 * (one.inertia - good.inertia)


def test_a_split_takes_the_largest_inertia_and_of_equals_the_lowest() -> None:
    """Two pairs of points equally wide, one wider: the first empty cluster takes from that, the next from the first."""
    vectors = np.array([[0, 0], [0, 2], [10, 0], [10, 2], [20, 0], [20, 6]], np.float32)
    centroids = np.array([[0, 1], [10, 1], [20, 3], [99, 99], [99, 99]], np.float64)
    step = update(centroids, assign_and_sum(vectors, centroids, spherical=False), spherical=False)
    assert step.reseeded == 2
    assert step.shift == 0
    np.testing.assert_allclose(step.centroids[[2, 3]].mean(axis=0), [20, 3])
    np.testing.assert_allclose(step.centroids[[0, 4]].mean(axis=0), [0, 1])
    np.testing.assert_array_equal(step.centroids[1], [10, 1])
    assert np.linalg.norm(step.centroids[2] - step.centroids[3]) == pytest.approx(0.2 * 3)


def test_a_cluster_can_be_split_again_and_again() -> None:
    vectors = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    centroids = np.concatenate([np.zeros((1, 3)), np.full((20, 3), 50.0)])
    step = update(centroids, assign_and_sum(vectors, centroids, spherical=False), spherical=False)
    assert step.reseeded == 20
    assert len(np.unique(step.centroids.round(9), axis=0)) == 21
    assert np.abs(step.centroids).max() < 2


@METRICS
def test_identical_vectors_are_not_split(spherical: bool) -> None:
    """Nor are those of a cluster whose centroid has not reached them yet."""
    vectors = np.repeat(np.array([[3.1, 0.7, 0.2], [-0.3, 2.2, 0.9]], np.float32), 500, axis=0)
    centroids = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, -1]])
    for step in iterate(vectors, centroids, 3, spherical):
        assert step.reseeded == 0
        np.testing.assert_array_equal(step.centroids[2], centroids[2])
    assert step.shift < 1e-6
    found = kmeans(vectors, 3, spherical=spherical, centroids=centroids)
    assert found.converged
    assert found.sizes.tolist() == [500, 500, 0]
    assert found.inertia == pytest.approx(0, abs=1e-6)


def test_empty_children_take_from_their_own_parent() -> None:
    generator = np.random.default_rng(0)
    near, wide = generator.standard_normal((40, 2)), 30 * generator.standard_normal((40, 2)) + 500
    vectors = np.concatenate([near, wide]).astype(np.float32)
    parents, offsets = np.repeat([0, 1], 40), np.array([0, 3, 5])
    centroids = np.array([[0, 0], [300, 0], [0, 300], [500, 500], [900, 500]], np.float64)
    total = assign_and_sum(vectors, centroids, spherical=False, parents=parents, offsets=offsets)
    assert total.sizes[1:3].sum() == 0
    step = update(centroids, total, spherical=False, offsets=offsets)
    assert np.abs(step.centroids[:3]).max() < 5


@METRICS
@pytest.mark.parametrize(
    ("vectors", "clusters"),
    [
        (np.ones((50, 4)), 1),  # all the same
        (np.ones((1, 4)), 1),
        (np.zeros((0, 4)), 0),
        (np.eye(4), 4),
        (np.repeat(np.eye(4)[:3], 30, axis=0), 3),
        (np.zeros((20, 4)), 1),
    ],
    ids=["same", "one", "none", "distinct", "three-distinct", "zero"],
)
def test_more_clusters_than_vectors(spherical: bool, vectors: np.ndarray, clusters: int) -> None:
    for k in (max(clusters, 1), clusters + 1, 70):
        found = kmeans(vectors.astype(np.float32), k, spherical=spherical)
        assert found.centroids.shape == (clusters, 4)
        assert (found.sizes > 0).all()
        assert found.sizes.sum() == len(found.labels) == len(found.distances) == len(vectors)
        assert found.inertia == (20 if spherical and len(vectors) == 20 else 0)  # cosine 0 with anything
        assert found.converged
        assert np.isfinite(found.centroids).all()


@METRICS
def test_one_cluster_is_the_mean(spherical: bool) -> None:
    vectors = blobs(200, 5, 3)
    found = kmeans(vectors, 1, spherical=spherical)
    points = directions(vectors) if spherical else vectors.astype(np.float64)
    mean = points.mean(axis=0, keepdims=True)
    np.testing.assert_allclose(found.centroids, directions(mean) if spherical else mean, atol=1e-9)


def test_no_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one cluster"):
        kmeans(np.ones((3, 2), np.float32), 0)


def test_tolerance_ends_iterations_and_scale_does_not_matter() -> None:
    vectors = blobs(3_000, 6, 5, spread=0.3)
    found = [kmeans(vectors * factor, 5, spherical=False, iterations=300) for factor in (1.0, 1024.0)]
    assert all(run.converged and run.iterations < 300 for run in found)
    assert found[0].iterations == found[1].iterations
    np.testing.assert_allclose(found[0].centroids * 1024, found[1].centroids)


@pytest.mark.parametrize("elbow", [0.2, 0.9, 0.975])
def test_elbow_takes_the_k_that_met_it(elbow: float) -> None:
    vectors = blobs(600, 6, 4, spread=0.15, number=3)
    k, objectives = choose_k(vectors, elbow=elbow, most=9, spherical=False, seed=0, repeats=2)
    expected = [
        min(kmeans(vectors, c, spherical=False, iterations=100, seed=s).inertia for s in (0, 1)) / 600
        for c in range(1, len(objectives) + 1)
    ]
    np.testing.assert_allclose(objectives, expected, rtol=1e-9)
    met = [c for c in range(2, len(objectives) + 1) if objectives[c - 1] > elbow * objectives[c - 2]]
    assert met == [k] if met else (k == 9 and len(objectives) == 9)


def test_elbow_finds_separate_groups() -> None:
    centres = 10 * np.eye(5, 8)
    noise = 0.1 * np.random.default_rng(0).standard_normal((500, 8))
    vectors = (np.repeat(centres, 100, axis=0) + noise).astype(np.float32)
    k, objectives = choose_k(vectors, elbow=0.85, most=12, spherical=False)
    assert k == 6  # up to five, each takes at least a quarter off
    assert objectives[4] < 0.05 * objectives[3]
    assert choose_k(vectors, elbow=0.85, most=3, spherical=False)[0] == 3


def test_choose_k_of_identical_vectors() -> None:
    k, _ = choose_k(np.ones((30, 4), np.float32), elbow=0.975, most=5, spherical=True)
    assert k <= 5
