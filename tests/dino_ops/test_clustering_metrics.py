"""Agreement of labellings against scikit-learn, counted whole and in parts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from dino_ops.clustering_metrics import Contingency, adjusted_rand_index, normalized_mutual_information


def noisy_copy(labels: np.ndarray, share: float, k: int) -> np.ndarray:
    generator = np.random.default_rng(len(labels))
    changed = generator.random(len(labels)) < share
    return np.where(changed, generator.integers(0, k, len(labels)), labels) + 7


@pytest.mark.parametrize("count", [1, 2, 50, 3_000])
@pytest.mark.parametrize("k", [1, 2, 9, 2_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_agrees_with_scikit_learn(count: int, k: int, share: float) -> None:
    first = np.random.default_rng(k).integers(-1, k, count)
    second = noisy_copy(first, share, k)
    counted = Contingency.of(first, second)
    assert normalized_mutual_information(counted) == pytest.approx(
        normalized_mutual_info_score(first, second), abs=1e-9
    )
    assert adjusted_rand_index(counted) == pytest.approx(adjusted_rand_score(first, second), abs=1e-12)


def test_parts_add_up_in_any_order() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 30, (12, 40, 50)), generator.integers(0, 4, (12, 40, 50))
    whole = Contingency.of(first, second)
    parts = [Contingency.of(a, b) for a, b in zip(first, second, strict=True)]
    for order in (range(12), reversed(range(12))):
        merged = sum((parts[i] for i in order), Contingency.empty())
        np.testing.assert_array_equal(merged.pairs, whole.pairs)
        np.testing.assert_array_equal(merged.counts, whole.counts)
    assert len(whole) == first.size


def test_ignored_truth_does_not_count() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.integers(0, 5, 500), generator.integers(0, 4, 500)
    kept = second != 3
    counted = Contingency.of(first, second, ignore=3)
    assert len(counted) == kept.sum()
    expected = normalized_mutual_info_score(first[kept], second[kept])
    assert normalized_mutual_information(counted) == pytest.approx(expected, abs=1e-12)


def test_edges() -> None:
    nothing = Contingency.of(np.zeros(0, int), np.zeros(0, int))
    assert normalized_mutual_information(nothing) == adjusted_rand_index(nothing) == 1
    one_label = Contingency.of(np.zeros(9, int), np.arange(9) // 3)
    assert normalized_mutual_information(one_label) == adjusted_rand_index(one_label) == 0
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        Contingency.of(np.zeros(3, int), np.zeros(4, int))


def test_pixels_of_a_large_dataset_do_not_overflow() -> None:
    """Pairs among 10^10 pixels exceed 64 bits."""
    pairs = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    large, small = (Contingency(pairs, scale * np.array([40, 10, 5, 45])) for scale in (10**8, 10**6))
    assert adjusted_rand_index(large) == pytest.approx(adjusted_rand_index(small), abs=1e-6)
