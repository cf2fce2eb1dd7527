"""Principal components against scikit-learn's definition by singular values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dino_ops.pca import PCA, fit_pca, pca_colours


@pytest.fixture
def rows() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.standard_normal((500, 6)) @ generator.standard_normal((6, 20)) + 100).astype(np.float32)


def test_equals_singular_value_decomposition(rows: np.ndarray) -> None:
    pca = fit_pca(rows, 4)
    mean = rows.astype(np.float64).mean(axis=0)
    _, singular, axes = np.linalg.svd(rows.astype(np.float64) - mean, full_matrices=False)
    np.testing.assert_allclose(pca.mean, mean)
    np.testing.assert_allclose(np.abs((pca.components * axes[:4]).sum(axis=1)), 1, atol=1e-9)
    np.testing.assert_allclose(pca.explained_variance, singular[:4] ** 2 / 499)
    expected = (rows.astype(np.float64) - mean) @ pca.components.T
    np.testing.assert_allclose(pca.transform(rows), expected, atol=2e-3)
    assert pca.transform(rows).dtype == np.float32


def test_signs_and_samples_are_deterministic(rows: np.ndarray) -> None:
    pca, flipped = fit_pca(rows, 3), fit_pca(rows[::-1], 3)
    np.testing.assert_allclose(pca.components, flipped.components, atol=1e-9)
    largest = np.abs(pca.components).argmax(axis=1)
    assert (pca.components[np.arange(3), largest] > 0).all()
    sampled = [fit_pca(rows, 3, seed=seed, max_rows=50).mean for seed in (1, 1, 2)]
    assert np.array_equal(sampled[0], sampled[1]) and not np.array_equal(sampled[0], sampled[2])


def test_sums_are_float64() -> None:
    """Channels with a large common offset lose their variance when summed in float32."""
    values = np.random.default_rng(0).standard_normal((40_000, 3)).astype(np.float32) * [3, 2, 1] + 10_000
    pca = fit_pca(values.astype(np.float32), 3)
    np.testing.assert_allclose(pca.explained_variance, [9, 4, 1], rtol=0.05)


def test_round_trip_and_limits(rows: np.ndarray) -> None:
    pca = fit_pca(rows, 2)
    again = PCA.from_arrays(pca.to_arrays())
    np.testing.assert_array_equal(again.transform(rows), pca.transform(rows))
    for k in (0, 21):
        with pytest.raises(ValueError, match="k goes from 1 to 20"):
            fit_pca(rows, k)


def test_colours(noise_map: Callable[..., np.ndarray]) -> None:
    maps = [noise_map(5, 6, 16, 1), 3 * noise_map(4, 7, 16, 2)]
    own, shared = pca_colours(maps), pca_colours(maps, shared_range=True)
    stacked = np.concatenate([feature_map.reshape(-1, 16) for feature_map in maps])
    projected = fit_pca(stacked, 4).transform(maps[0])[..., 1:]
    for channel in range(3):
        order = np.argsort(projected[..., channel].ravel())
        assert (np.diff(own[0][..., channel].ravel()[order].astype(int)) >= 0).all()
    for colours, feature_map in zip(own, maps, strict=True):
        assert colours.shape == (*feature_map.shape[:2], 3) and colours.dtype == np.uint8
        assert colours.reshape(-1, 3).min(axis=0).tolist() == [0, 0, 0]
        assert colours.reshape(-1, 3).max(axis=0).tolist() == [255, 255, 255]
    assert np.ptp(shared[0]) < 255  # the other map reaches farther
    assert pca_colours([]) == []
