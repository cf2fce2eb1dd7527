"""Nearest centroids and their sums against distances written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_ops.competing_centroids import CompetingCentroids
from dino_ops.kmeans_assignment import Codebook, LloydPass, PartialSums, assign, assign_and_sum, partial_sums

METRICS = pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])


def points(vectors: np.ndarray, spherical: bool) -> np.ndarray:
    wide = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0) if spherical else wide


def noise(count: int, dimension: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).standard_normal((count, dimension)).astype(np.float32)


def distances_to(vectors: np.ndarray, centroids: np.ndarray, spherical: bool) -> np.ndarray:
    """(n, k), the long way."""
    held = points(vectors, spherical)
    if spherical:
        return 1 - held @ centroids.T
    return np.linalg.norm(held[:, None] - centroids, axis=2)


@METRICS
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "array"])
def test_nearest_and_sums(spherical: bool, k: int, kind: str) -> None:
    vectors = noise(200, 20)
    vectors[3] = 0
    tensor = torch.from_numpy(vectors) if kind == "array" else torch.from_numpy(vectors).to(getattr(torch, kind))
    held = tensor.float().numpy()
    centroids = points(noise(k, 20, 1), spherical)
    expected = distances_to(held, centroids, spherical)
    given = vectors if kind == "array" else tensor
    for block_rows in (1, 7, 64, 1000, None):
        if block_rows == 1 and kind != "float32":
            continue
        labels, distances = assign(given, centroids, spherical=spherical, block_rows=block_rows)
        assert (labels.dtype, distances.dtype) == (torch.int64, torch.float32)
        np.testing.assert_array_equal(labels, expected.argmin(axis=1))
        np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-6, atol=1e-12)
        total = assign_and_sum(given, centroids, spherical=spherical, block_rows=block_rows)
        apart = expected.min(axis=1) ** (1 if spherical else 2)
        for c in range(k):
            inside = expected.argmin(axis=1) == c
            assert total.sizes[c] == inside.sum()
            np.testing.assert_allclose(total.sums[c], points(held, spherical)[inside].sum(axis=0), atol=1e-12)
            assert total.inertia[c] == pytest.approx(apart[inside].sum(), abs=1e-9)
        assert [part.dtype for part in vars(total).values()] == [np.float64, np.int64, np.float64]
        again = partial_sums(given, labels, distances, k, spherical=spherical)
        np.testing.assert_allclose(again.sums, total.sums, atol=1e-12)
        np.testing.assert_array_equal(again.sizes, total.sizes)
        np.testing.assert_allclose(again.inertia, total.inertia, rtol=1e-6)


@METRICS
@pytest.mark.parametrize("block_rows", [1, 9, None])
def test_vectors_meet_only_the_children_of_their_parent(spherical: bool, block_rows: int | None) -> None:
    vectors, offsets = noise(300, 8), np.array([0, 5, 5, 40, 41])
    parents = np.random.default_rng(2).choice([0, 2, 3], 300)
    centroids = points(noise(41, 8, 1), spherical)
    expected = distances_to(vectors, centroids, spherical)
    for row, parent in enumerate(parents):
        others = np.ones(41, bool)
        others[offsets[parent] : offsets[parent + 1]] = False
        expected[row, others] = np.inf
    for held in (parents, torch.from_numpy(parents).to(torch.int32)):
        labels, distances = assign(
            vectors, centroids, spherical=spherical, parents=held, offsets=offsets, block_rows=block_rows
        )
        np.testing.assert_array_equal(labels, expected.argmin(axis=1))
        np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-6)
    total = assign_and_sum(vectors, centroids, spherical=spherical, parents=parents, offsets=offsets)
    np.testing.assert_array_equal(total.sizes, np.bincount(expected.argmin(axis=1), minlength=41))
    np.testing.assert_allclose(total.sums.sum(axis=0), points(vectors, spherical).sum(axis=0), atol=1e-9)


@METRICS
def test_of_equally_near_centroids_the_lowest(spherical: bool) -> None:
    """Equal centroids far apart in the list, and in every lane; every row is decided in float64."""
    distinct = points(noise(40, 12, 1), spherical)
    centroids = np.concatenate([distinct, distinct[::-1], distinct])
    vectors = noise(700, 12)
    for block_rows in (1, 50, 1000):
        labels, _ = assign(vectors, centroids, spherical=spherical, block_rows=block_rows)
        np.testing.assert_array_equal(labels, distances_to(vectors, distinct, spherical).argmin(axis=1))


@METRICS
def test_what_float32_cannot_tell_is_decided_in_float64(spherical: bool) -> None:
    """Centroids that differ in the eighth digit: float32 alone gets a good part of the rows wrong."""
    generator = np.random.default_rng(0)
    centroids = generator.standard_normal((1, 48)) + 1e-8 * generator.standard_normal((40, 48))
    centroids = points(centroids, spherical)
    vectors = noise(400, 48, 4)
    expected = np.empty(400, np.int64)
    for row, vector in enumerate(vectors.astype(np.longdouble)):
        towards = centroids.astype(np.longdouble) @ vector
        squared = (centroids.astype(np.longdouble) ** 2).sum(axis=1)
        expected[row] = (towards if spherical else towards - squared / 2).argmax()
    for block_rows in (1, 64, None):
        labels, _ = assign(vectors, centroids, spherical=spherical, block_rows=block_rows)
        assert (labels.numpy() == expected).mean() > 0.99  # 1e-12 of the lengths is a tie
    single = (vectors @ centroids.astype(np.float32).T).argmax(axis=1)
    assert (single == expected).mean() < 0.9


@METRICS
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_bound_holds(spherical: bool, offset: float) -> None:
    """Scores of float32 products are off by no more than half of what counts as too close."""
    vectors = torch.from_numpy(noise(2_000, 64) * np.float32(3) + np.float32(offset))
    codebook = Codebook(points(noise(200, 64, 1) + offset, spherical), spherical=spherical)
    competing = codebook._range(0)
    matrix, bias = competing.padded
    single = torch.addmm(bias, vectors, matrix.T)[:, :200].double()
    exact = torch.addmm(competing.bias, vectors.double(), competing.matrix.T)
    uncertainty = competing.uncertainty(torch.linalg.vector_norm(vectors, dim=1))
    assert ((single - exact).abs() <= uncertainty[:, None] / 2).all()


@METRICS
def test_far_from_the_origin(spherical: bool) -> None:
    """Clusters a thousand times closer to each other than to the origin."""
    vectors = (noise(600, 16) + np.float32(1000)).astype(np.float32)
    centroids = points(vectors[:12], spherical)
    expected = distances_to(vectors.astype(np.longdouble), centroids.astype(np.longdouble), spherical)
    labels, distances = assign(vectors, centroids, spherical=spherical)
    np.testing.assert_array_equal(labels, expected.argmin(axis=1))
    if not spherical:
        np.testing.assert_allclose(distances, expected.min(axis=1).astype(float), rtol=1e-6, atol=1e-9)


@METRICS
def test_shortened_products_change_nothing(spherical: bool) -> None:
    """Where torch may use TensorFloat-32 or bfloat16, more rows are decided in float64."""
    vectors, centroids = noise(900, 32), points(noise(60, 32, 1), spherical)
    expected, _ = assign(vectors, centroids, spherical=spherical)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            labels, _ = assign(vectors, centroids, spherical=spherical)
            assert torch.equal(labels, expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_is_bounded_when_every_row_is_too_close(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = []
    exactly = CompetingCentroids.nearest_exactly

    def recorded(competing: CompetingCentroids, block: torch.Tensor) -> torch.Tensor:
        decided.append(len(block))
        return exactly(competing, block)

    monkeypatch.setattr(CompetingCentroids, "nearest_exactly", recorded)
    labels, _ = assign(np.ones((1_000, 6), np.float32), np.ones((5, 6)), spherical=False, block_rows=20)
    assert not labels.any()
    assert sum(decided) == 1_000
    assert max(decided) <= 20


def test_few_rows_are_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In ordinary data, so that float64 costs little."""
    decided = []
    exactly = CompetingCentroids.nearest_exactly
    monkeypatch.setattr(
        CompetingCentroids, "nearest_exactly", lambda held, block: decided.append(len(block)) or exactly(held, block)
    )
    for spherical in (True, False):
        assign(noise(5_000, 384), points(noise(200, 384, 1), spherical), spherical=spherical)
    assert 0 < sum(decided) < 200


def test_a_pass_over_pieces_is_one_over_all() -> None:
    vectors, centroids = noise(500, 8), noise(9, 8, 1).astype(np.float64)
    codebook = Codebook(centroids, spherical=False)
    lloyd = LloydPass(codebook)
    labels = torch.cat([lloyd.add(piece) for piece in np.array_split(vectors, 7)])
    whole = assign_and_sum(vectors, codebook, spherical=False)
    np.testing.assert_array_equal(labels, codebook.assign(vectors)[0])
    for name, part in vars(lloyd.total()).items():
        np.testing.assert_allclose(part, vars(whole)[name], rtol=1e-12, err_msg=name)


def test_arrays_that_must_not_be_written_to() -> None:
    """Which is what Ray's object store gives."""
    vectors, centroids = noise(50, 4).astype(np.float16), noise(3, 4, 1).astype(np.float64)
    for array in (vectors, centroids):
        array.flags.writeable = False
    labels, _ = assign(vectors, centroids, spherical=False)
    np.testing.assert_array_equal(labels, distances_to(vectors, centroids, False).argmin(axis=1))


def test_tiny_and_large_vectors() -> None:
    """Products of which float32 keeps nothing, and squares near its end."""
    centroids = points(noise(10, 6, 1), True)
    for factor in (1e-38, 1e-25, 1e16):
        vectors = noise(200, 6) * np.float32(factor)
        labels, distances = assign(vectors, centroids, spherical=True)
        expected = distances_to(vectors, centroids, True)
        np.testing.assert_array_equal(labels, expected.argmin(axis=1))
        np.testing.assert_allclose(distances, expected.min(axis=1), rtol=1e-6)


def test_no_vectors() -> None:
    labels, distances = assign(np.zeros((0, 4), np.float32), np.ones((3, 4)), spherical=False)
    assert (labels.shape, distances.shape) == ((0,), (0,))
    total = assign_and_sum(torch.zeros(0, 4), np.zeros((0, 4)), spherical=True)
    assert total.sums.shape == (0, 4)
    zeros = PartialSums.zeros(3, 4) + assign_and_sum(torch.zeros(0, 4), np.ones((3, 4)), spherical=True)
    assert not zeros.sizes.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_values_that_are_no_vectors_are_refused(bad: float) -> None:
    vectors = noise(40, 4)
    vectors[17, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        assign(vectors, np.eye(4), spherical=True)


def test_what_does_not_fit_is_refused() -> None:
    vectors, centroids, offsets = noise(6, 4), np.eye(4), np.array([0, 2, 2, 4])
    with pytest.raises(ValueError, match="centroids have 4 values"):
        assign(noise(6, 5), centroids, spherical=True)
    with pytest.raises(ValueError, match="no centroids"):
        assign(vectors, np.zeros((0, 4)), spherical=True)
    with pytest.raises(ValueError, match="both or neither"):
        assign(vectors, centroids, spherical=True, offsets=offsets)
    with pytest.raises(ValueError, match="6 vectors have 2 parents"):
        assign(vectors, centroids, spherical=True, offsets=offsets, parents=np.zeros(2, int))
    with pytest.raises(ValueError, match="parent 1, which has no centroids"):
        assign(vectors, centroids, spherical=True, offsets=offsets, parents=np.array([0, 1, 0, 2, 0, 0]))
    with pytest.raises(ValueError, match="parents are 0 to 2, but 0 to 3"):
        assign(vectors, centroids, spherical=True, offsets=offsets, parents=np.array([0, 3, 0, 2, 0, 0]))
    with pytest.raises(ValueError, match="offsets rise from 0 to the number of centroids, 4"):
        Codebook(centroids, spherical=True, offsets=np.array([0, 5]))
