from __future__ import annotations

import numpy as np
import pytest

from dino_ops.crops import random_crops


def test_crops_of_the_image_and_its_mirror_image() -> None:
    """Pixels name their place, so each crop says where it is from."""
    y, x = np.mgrid[:41, :64]
    image = np.stack([y, x, np.zeros_like(x)], axis=2).astype(np.uint8)
    crops = random_crops(image, 30, np.random.default_rng(0))
    assert len(crops) == 60
    corners = []
    for number, crop in enumerate(crops):
        assert crop.shape == (38, 60, 3)  # 38.95 and 60.8
        top, left = map(int, crop[0, 0, :2])
        step = -1 if number % 2 else 1
        expected = image[top : top + 38, left::step][:, :60]
        np.testing.assert_array_equal(crop, expected)
        corners.append((top, left))
    assert {top for top, _ in corners} == {0, 1, 2, 3}
    assert {left for _, left in corners[::2]} == {0, 1, 2, 3, 4}
    assert {left for _, left in corners[1::2]} == {63, 62, 61, 60, 59}


def test_the_generator_decides() -> None:
    image = np.random.default_rng(3).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    first, again, other = (random_crops(image, 4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 30, 3)])
def test_small_images_and_no_crops(shape: tuple[int, int, int]) -> None:
    image = np.zeros(shape, np.uint8)
    assert random_crops(image, 0, np.random.default_rng(0)) == []
    assert all(0 not in crop.shape for crop in random_crops(image, 3, np.random.default_rng(0)))
