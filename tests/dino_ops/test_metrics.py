"""Metrics against cases done by hand, loops over points, and scikit-learn's average precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dino_ops.metrics import average_precision, box_side, image_side, keypoint_box_side, pck, retrieval_by_label


def test_pck_by_hand() -> None:
    """Pair 7 has one point, which is right; pair 3 has three, of which one is right: on the threshold counts."""
    errors, lengths = np.array([1.0, 10.0, 10.1, 99.0]), np.array([50.0, 100.0, 100.0, 100.0])
    found = pck(errors, lengths, np.array([7, 3, 3, 3]), alphas=[0.1])
    np.testing.assert_allclose(found.per_pair, [(1 + 1 / 3) / 2])
    np.testing.assert_allclose(found.per_point, [2 / 4])


def test_pck_by_loops() -> None:
    rng = np.random.default_rng(0)
    errors, pairs = rng.uniform(0, 40, 200), rng.integers(0, 12, 200)
    lengths, alphas = rng.uniform(50, 300, 200), (0.05, 0.1, 0.15)
    found = pck(errors, lengths, pairs, alphas)
    for at, alpha in enumerate(alphas):
        right = [error <= alpha * length for error, length in zip(errors, lengths, strict=True)]
        by_pair: dict[int, list[bool]] = {}
        for pair, one in zip(pairs, right, strict=True):
            by_pair.setdefault(int(pair), []).append(one)
        assert found.per_point[at] == pytest.approx(sum(right) / 200)
        assert found.per_pair[at] == pytest.approx(sum(sum(p) / len(p) for p in by_pair.values()) / len(by_pair))


def test_pck_without_points_is_nan() -> None:
    nothing = np.zeros(0)
    found = pck(nothing, nothing, nothing, alphas=[0.1, 0.2])
    assert np.isnan(found.per_pair).all() and np.isnan(found.per_point).all() and len(found.per_pair) == 2


def test_lengths_of_thresholds() -> None:
    assert image_side(height=120, width=80) == 120
    assert box_side((10, 20, 40, 30)) == 30
    assert keypoint_box_side(np.array([[5.0, 1.0], [9.0, 31.0], [7.0, 2.0]])) == 30
    assert keypoint_box_side(np.array([[5.0, 1.0]])) == 0  # one point: only a perfect answer is right


def test_average_precision_is_that_of_scikit_learn() -> None:
    relevant = np.random.default_rng(1).random((30, 25)) < 0.3
    relevant[:, 4] = True  # at least one each
    scores = -np.arange(25.0)
    expected = [average_precision_score(row, scores) for row in relevant]
    np.testing.assert_allclose(average_precision(relevant), expected)


def test_average_precision_by_hand() -> None:
    relevant = np.array([[True, False, True], [False, False, False]])
    np.testing.assert_allclose(average_precision(relevant), [(1 / 1 + 2 / 3) / 2, 0])


@pytest.mark.parametrize("block_rows", [None, 1, 7])
def test_retrieval_by_loops(block_rows: int | None) -> None:
    rng = np.random.default_rng(2)
    labels = [*(f"label {number}" for number in rng.integers(0, 6, 40)), "alone"]
    embeddings = rng.normal(size=(41, 8))
    found = retrieval_by_label(embeddings, labels, ks=(1, 5), block_rows=block_rows)
    first, five, precision = [], [], []
    for query in range(40):
        others = [at for at in range(41) if at != query]
        cosine = [
            embeddings[query] @ embeddings[at] / np.linalg.norm(embeddings[query]) / np.linalg.norm(embeddings[at])
            for at in others
        ]
        same = [labels[at] == labels[query] for at in others]
        ranked = [one for _, one in sorted(zip(cosine, same, strict=True), reverse=True)]
        first.append(ranked[0])
        five.append(any(ranked[:5]))
        precision.append(average_precision_score(same, cosine))
    assert (found.queries, found.alone) == (40, 1)
    assert found.recall == {1: pytest.approx(np.mean(first)), 5: pytest.approx(np.mean(five))}
    assert found.mean_average_precision == pytest.approx(np.mean(precision))


def test_retrieval_where_every_image_finds_its_own() -> None:
    embeddings = np.array([[1, 0], [2, 0.1], [0, 1], [0, 3]], np.float32)  # lengths do not matter
    found = retrieval_by_label(embeddings, ["a", "a", "b", "b"])
    assert found.recall == {1: 1, 5: 1, 10: 1} and found.mean_average_precision == 1


def test_an_image_never_finds_itself() -> None:
    """Of three equal vectors, the one of another label comes first for the last image."""
    found = retrieval_by_label(np.ones((3, 4)), ["other", "same", "same"], ks=(1, 2))
    assert found.recall == {1: 0, 2: 1} and found.mean_average_precision == 0.5


def test_vectors_of_zeros_are_ranked() -> None:
    found = retrieval_by_label(np.array([[0, 0], [1, 0], [-1, 0]]), ["a", "a", "b"], ks=(1,))
    assert found.recall == {1: 1} and found.alone == 1


def test_broken_vectors_are_ranked_as_zeros() -> None:
    """A nan would stand first in every ranking, or last, as sorting has it."""
    broken, zeros = np.array([[np.nan, 1], [1, 0], [-1, 0], [1, 0.5]]), np.array([[0, 0], [1, 0], [-1, 0], [1, 0.5]])
    labels = ["a", "a", "b", "b"]
    assert retrieval_by_label(broken, labels, ks=(1, 2)) == retrieval_by_label(zeros, labels, ks=(1, 2))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_retrieval_with_nothing_to_find_is_nan(count: int) -> None:
    found = retrieval_by_label(np.ones((count, 4)), list(range(count)))
    assert (found.queries, found.alone) == (0, count)
    assert math.isnan(found.mean_average_precision) and all(map(math.isnan, found.recall.values()))
