"""Carrying key points, against loops over all patches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dino_ops.descriptors import binned_similarity, log_bin
from dino_ops.keypoints import nearest_patches, transfer_cells, transfer_points

NoiseMap = Callable[..., np.ndarray]


def centres(height: int, width: int, step_y: float, step_x: float) -> tuple[np.ndarray, np.ndarray]:
    """(y, x) of a grid in pixels of an original that was resized by different amounts along its axes."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (y + 0.5) * step_y, (x + 0.5) * step_x


def test_nearest_patches_by_loops() -> None:
    y, x = centres(5, 7, 8.0, 11.5)
    points_xy = np.random.default_rng(0).uniform(-20, 110, (60, 2))  # some lie outside the image
    expected = [np.argmin((x.ravel() - px) ** 2 + (y.ravel() - py) ** 2) for px, py in points_xy]
    np.testing.assert_array_equal(nearest_patches(points_xy, y, x), expected)


@pytest.mark.parametrize("binned", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_transfer_by_loops(noise_map: NoiseMap, binned: bool, dtype: type) -> None:
    a, b = noise_map(6, 9, 16, seed=1).astype(dtype), noise_map(7, 4, 16, seed=2).astype(dtype)
    cells = np.array([0, 53, 20, 20, 8])
    wide = [log_bin(one.astype(np.float64)) if binned else one.astype(np.float64) for one in (a, b)]
    flat_a, flat_b = (one.reshape(-1, one.shape[-1]) for one in wide)
    for cell, found in zip(cells, transfer_cells(a, cells, b, binned=binned), strict=True):
        cosine = [flat_a[cell] @ row / np.linalg.norm(flat_a[cell]) / np.linalg.norm(row) for row in flat_b]
        assert found == np.argmax(cosine)


def test_transfer_takes_tensors_and_no_cells(noise_map: NoiseMap) -> None:
    a, b = (torch.from_numpy(noise_map(4, 5, 8, seed=seed)) for seed in (3, 4))
    expected = binned_similarity(a, b).argmax(dim=1).numpy()
    np.testing.assert_array_equal(transfer_cells(a, np.arange(20), b), expected)
    assert transfer_cells(a, np.zeros(0, np.int64), b).shape == (0,)


@pytest.mark.parametrize("binned", [True, False])
def test_transfer_takes_read_only_arrays(noise_map: NoiseMap, binned: bool) -> None:
    """Columns of Arrow tables are such; torch would warn of them, and warnings fail tests."""
    a, b = noise_map(4, 5, 8, seed=3), noise_map(4, 5, 8, seed=4)
    expected = transfer_cells(a, np.arange(20), b, binned=binned)
    for one in (a, b):
        one.flags.writeable = False
    np.testing.assert_array_equal(transfer_cells(a, np.arange(20), b, binned=binned), expected)


@pytest.mark.parametrize("binned", [True, False])
def test_points_land_on_the_centre_of_the_same_content(noise_map: NoiseMap, binned: bool) -> None:
    """The target shows the source's patches shifted by two rows and one column, at another scale."""
    scene = noise_map(20, 20, 16, seed=5)
    a, b = scene[2:18, 1:17], scene[:16, :16]
    points_xy = np.array([[8 * 5 + 1.0, 8 * 6 + 7.0]])  # x in column 5, y in row 6
    found = transfer_points(points_xy, a, centres(16, 16, 8, 8), b, centres(16, 16, 4, 2), binned=binned)
    np.testing.assert_allclose(found, [[2 * 6.5, 4 * 8.5]])
