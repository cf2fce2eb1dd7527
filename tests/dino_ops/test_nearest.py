"""The nearest-vector index against exact search, and what adding and removing leave."""

from __future__ import annotations

import numpy as np
import pytest

from dino_ops.nearest import (
    MIN_TRAINING_VECTORS,
    Kind,
    NearestIndex,
    choose_kind,
    estimate_bytes,
    pool,
    search_all,
    training_size,
    unit,
)

KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivfpq")
DIMENSION = 64


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around centres, as features are: (count, DIMENSION) float32."""
    centres = np.random.default_rng(0).standard_normal((max(1, count // 50), DIMENSION), np.float32)
    generator = np.random.default_rng(seed + 1)
    noise = 0.6 * generator.standard_normal((count, DIMENSION), np.float32)
    return unit(centres[generator.integers(0, len(centres), count)] + noise)


def build(kind: Kind, vectors: np.ndarray, ids: np.ndarray | None = None) -> NearestIndex:
    index = NearestIndex.create(kind, vectors.shape[1], len(vectors), vectors[: training_size(len(vectors))])
    index.add(vectors, np.arange(len(vectors)) if ids is None else ids)
    return index


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k nearest, best first: (n, k)."""
    return np.argsort(-(queries @ vectors.T), axis=1)[:, :k]


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_added_and_removed_decides_the_answers(kind: Kind) -> None:
    vectors = clustered(MIN_TRAINING_VECTORS + 1000)
    index = build(kind, vectors[:-1000])
    index.add(vectors[-1000:], np.arange(len(vectors) - 1000, len(vectors)))
    gone = np.arange(0, len(vectors), 20)
    index.remove(gone)
    index.remove(gone)  # again changes nothing
    assert len(index) == len(vectors) - len(gone)
    left = np.setdiff1d(np.arange(len(vectors)), gone)
    queries = clustered(100, seed=5)
    cosine, ids = index.search(queries, 10)
    assert not np.isin(ids, gone).any()
    nearest = left[exact(queries, vectors[left], 10)]
    assert recall(ids, nearest) >= 0.95
    expected = np.einsum("qd,qkd->qk", queries, vectors[ids])
    np.testing.assert_allclose(cosine, expected, atol=1e-3)
    assert np.all(np.diff(cosine, axis=1) <= 0)
    index.purge()
    assert recall(index.search(queries, 10)[1], nearest) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recall_at_10_of_100k_vectors(kind: Kind) -> None:
    vectors, queries = clustered(100_000), clustered(500, seed=5)
    _, ids = build(kind, vectors).search(queries, 10)
    assert recall(ids, exact(queries, vectors, 10)) >= 0.95


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_fewer_vectors_than_asked_for(kind: Kind) -> None:
    index = build(kind, np.eye(3, dtype=np.float32), np.array([5, 7, 9]))
    cosine, ids = index.search(np.array([[0, 2.0, 0]], np.float32), 5)
    assert ids[0, 0] == 7 and cosine[0, 0] == pytest.approx(1)
    assert ids[0, 3:].tolist() == [-1, -1] and np.isneginf(cosine[0, 3:]).all()
    index.remove(np.array([5, 7, 9]))
    assert len(index) == 0 and (index.search(np.eye(3, dtype=np.float32), 1)[1] == -1).all()


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_purging_gives_space_back_where_it_can(kind: Kind) -> None:
    vectors = clustered(500)
    index = build(kind, vectors)
    index.remove(np.arange(0, 500, 3))
    before = index.search(vectors[:50], 10)
    index.purge()
    assert (len(index.ids), len(index.dead)) == ((333, 0) if kind == "flat" else (500, 167))
    assert len(index) == 333 and index.parts["vectors"].ntotal == len(index.ids)
    for was, now in zip(before, index.search(vectors[:50], 10), strict=True):
        np.testing.assert_array_equal(was, now)


def test_several_indices_answer_as_one() -> None:
    kind: Kind = "flat"
    vectors, queries = clustered(300), clustered(20, seed=5)
    parts = [build(kind, vectors[a:b], np.arange(a, b)) for a, b in ((0, 200), (200, 203), (203, 300))]
    parts[0].remove(np.arange(50))
    whole = build(kind, vectors)
    whole.remove(np.arange(50))
    for k in (1, 7, 280):
        cosine, ids = search_all(parts, queries, k)
        expected_cosine, expected_ids = whole.search(queries, k)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(cosine, expected_cosine, atol=1e-6)
    merged = parts[0]
    for part in parts[1:]:
        merged.absorb(part)
    np.testing.assert_array_equal(merged.search(queries, 30)[1], whole.search(queries, 30)[1])
    assert (search_all([], queries, 3)[1] == -1).all()


def test_a_dimension_that_the_quantiser_cannot_divide() -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((MIN_TRAINING_VECTORS, 7), np.float32))
    cosine, ids = build("ivfpq", vectors).search(vectors[:50], 1)
    assert (ids[:, 0] == np.arange(50)).mean() > 0.95
    np.testing.assert_allclose(cosine[:, 0], 1, atol=1e-3)


def test_ivfpq_needs_vectors_to_train_on() -> None:
    with pytest.raises(ValueError, match="10,240 vectors"):
        NearestIndex.create("ivfpq", 8, 100, np.zeros((100, 8), np.float32))


@pytest.mark.parametrize(
    ("count", "dimension", "gigabytes", "kind"),
    [
        (1_000, 384, 8, "flat"),
        (1_000_000, 384, 8, "hnsw"),
        (1_000_000, 384, 1.2, "ivfpq"),
        (20_000_000, 384, 64, "ivfpq"),
    ],
)
def test_the_kind_follows_count_and_memory(count: int, dimension: int, gigabytes: float, kind: str) -> None:
    choice = choose_kind(count, dimension, gigabytes * 1e9)
    assert choice.kind == kind and f"{count:,}" in choice.why
    assert choice.memory_bytes == estimate_bytes(choice.kind, count, dimension) <= gigabytes * 1e9


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(MemoryError, match=r"need 8\.8 GB"):
        choose_kind(10_000_000, 384, 1e9)


def test_pooling() -> None:
    patches = np.array([[1.0, 8.0], [3.0, -8.0]], np.float32)
    np.testing.assert_allclose(pool(patches, "mean"), [2, 0])
    np.testing.assert_allclose(pool(patches, "gem"), [14 ** (1 / 3), 256 ** (1 / 3)], rtol=1e-6)
