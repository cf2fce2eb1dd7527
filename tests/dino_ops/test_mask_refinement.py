"""Masks brought to pixels; the published code's refined masks are tested with co-segmentation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from dino_ops.mask_refinement import grabcut, resize_mask


def disc(size: int, radius: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size // 2
    return x**2 + y**2 <= radius**2


def test_resizing_is_pillows_lanczos_of_one_bit() -> None:
    mask = np.random.default_rng(0).random((13, 17)) > 0.5
    for height, width in ((100, 150), (13, 17), (7, 40), (1, 1)):
        pillows = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.LANCZOS))
        ours = resize_mask(mask, height, width)
        assert ours.dtype == bool
        np.testing.assert_array_equal(ours, pillows)


def test_part_labels_are_resized_too() -> None:
    labels = np.array([[-1, 0, 300], [2, -1, 70_000]], np.int32)
    ours = resize_mask(labels, 4, 9)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, labels.repeat(2, axis=0).repeat(3, axis=1))
    with pytest.raises(ValueError, match="nothing to resize"):
        resize_mask(labels[:0], 4, 4)


def test_edges_move_to_those_of_the_image() -> None:
    generator = np.random.default_rng(0)
    truth = disc(120, 35)
    rgb = np.where(truth[..., None], [200, 60, 40], [40, 90, 160]) + generator.integers(-20, 20, (120, 120, 3))
    rough = disc(30, 9)
    resized = resize_mask(rough, 120, 120)
    refined = grabcut(rough, rgb.astype(np.uint8))
    assert refined.refined and refined.note == ""
    assert (resized != truth).sum() > 200
    assert (refined.mask != truth).sum() < 20


def test_the_same_whatever_ran_before(photo: Image.Image) -> None:
    rgb, rough = np.array(photo)[::2, ::2], disc(15, 6)
    first = grabcut(rough, rgb).mask
    for seed in range(1, 4):
        cv2.setRNGSeed(seed)
        np.testing.assert_array_equal(grabcut(rough, rgb).mask, first)


@pytest.mark.parametrize(("value", "note"), [(False, "there is no foreground"), (True, "there is no background")])
def test_masks_that_cannot_be_refined(value: bool, note: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    result = grabcut(np.full((5, 6), value), rgb)
    assert not result.refined and result.note == f"not refined: {note}"
    np.testing.assert_array_equal(result.mask, np.full((50, 60), value))


def test_only_opencvs_errors_are_caught() -> None:
    with pytest.raises(AttributeError):
        grabcut(np.ones((2, 2), bool), [[1, 2], [3, 4]])  # a list is a mistake of the caller, not an empty mask
