"""The permutohedral lattice against sums over all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from dino_ops.permutohedral import PermutohedralFilter, _enclosing_simplices, _onto_hyperplane


@pytest.mark.parametrize(("dimensions", "error"), [(1, 0.01), (2, 0.02), (3, 0.03), (5, 0.25)])
def test_sums_of_all_pairs(dimensions: int, error: float) -> None:
    """Up to a factor; in more dimensions 600 points leave holes in the lattice, which costs accuracy."""
    generator = np.random.default_rng(0)
    features = 1.5 * generator.standard_normal((600, dimensions))
    values = generator.random((600, 3))
    squared = ((features[:, None] - features) ** 2).sum(axis=2)
    exact = np.exp(-squared / 2) @ values
    ours = PermutohedralFilter(features)(values)
    assert ours.shape == (600, 3)
    factor = (ours * exact).sum() / (ours**2).sum()
    assert np.linalg.norm(factor * ours - exact) <= error * np.linalg.norm(exact)


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_the_lattice_keeps_distances(dimensions: int) -> None:
    features = np.random.default_rng(1).standard_normal((40, dimensions))
    elevated = _onto_hyperplane(features)
    np.testing.assert_allclose(elevated.sum(axis=1), 0, atol=1e-12)
    before = ((features[:, None] - features) ** 2).sum(axis=2)
    after = ((elevated[:, None] - elevated) ** 2).sum(axis=2)
    np.testing.assert_allclose(after, before * (dimensions + 1) ** 2 * 2 / 3, atol=1e-9)


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_a_point_is_the_weighted_mean_of_its_corners(dimensions: int) -> None:
    points = _onto_hyperplane(3 * np.random.default_rng(2).standard_normal((200, dimensions)))
    base, rank, weights = _enclosing_simplices(points)
    axes = dimensions + 1
    assert (base % axes == 0).all() and (base.sum(axis=1) == 0).all()
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    mean = np.zeros_like(points)
    for number in range(len(points)):
        for corner in range(axes):
            steps = np.where(rank[number] < axes - corner, corner, corner - axes)
            mean[number] += weights[number, corner] * (base[number] + steps)
    np.testing.assert_allclose(mean, points, atol=1e-9)


def test_one_point_and_equal_points() -> None:
    assert PermutohedralFilter(np.zeros((1, 5)))(np.ones((1, 2))).shape == (1, 2)
    same = PermutohedralFilter(np.full((4, 2), 3.7))(np.arange(4.0)[:, None])
    np.testing.assert_allclose(same, same[0, 0])


def test_features_that_reach_too_far() -> None:
    with pytest.raises(ValueError, match="larger standard deviations"):
        PermutohedralFilter(np.array([[0.0] * 5, [1e9] * 5]))
