"""Sizes, scales and coordinates of prepared images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode

from dino_ops.errors import ImageError
from dino_ops.images import ImageSpec, patch_centres, prepare_image


def test_shorter_side_equals_torchvision(photo: Image.Image) -> None:
    for image in (photo, photo.transpose(Image.Transpose.ROTATE_90), photo.crop((0, 0, 301, 299))):
        expected = np.asarray(T.Resize(224, InterpolationMode.LANCZOS)(image))
        prepared = prepare_image(image, ImageSpec(shorter_side=224), 16)
        np.testing.assert_array_equal(prepared.pixels, expected)
        assert (prepared.width, prepared.height) == image.size
        assert prepared.scale_y == image.height / expected.shape[0]
        assert prepared.scale_x == image.width / expected.shape[1]


def test_longer_side_is_truncated() -> None:
    assert ImageSpec(shorter_side=224).resized_hw(300, 401) == (224, 299)  # 299.41
    assert ImageSpec(shorter_side=224).resized_hw(299, 100) == (669, 224)  # 669.76


def test_exact_and_native_sizes(photo: Image.Image) -> None:
    exact = prepare_image(photo, ImageSpec(size_hw=(96, 160)), 16)
    assert exact.pixels.shape == (96, 160, 3)
    assert (exact.scale_y, exact.scale_x) == (300 / 96, 451 / 160)
    native = prepare_image(photo, ImageSpec(shorter_side=None), 16)
    np.testing.assert_array_equal(native.pixels, np.asarray(photo))
    assert (native.scale_y, native.scale_x) == (1, 1)


def test_right_size_is_not_resampled() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    for spec in (ImageSpec(shorter_side=64), ImageSpec(size_hw=(64, 80))):
        np.testing.assert_array_equal(prepare_image(noise, spec, 16).pixels, noise)


def test_bicubic_differs_from_lanczos(photo: Image.Image) -> None:
    expected = np.asarray(photo.resize((80, 64), Image.Resampling.BICUBIC))
    pixels = prepare_image(photo, ImageSpec(size_hw=(64, 80), resample="bicubic"), 16).pixels
    np.testing.assert_array_equal(pixels, expected)
    assert (pixels != prepare_image(photo, ImageSpec(size_hw=(64, 80)), 16).pixels).any()


def test_crop_cuts_right_and_bottom(photo: Image.Image) -> None:
    whole = prepare_image(photo, ImageSpec(shorter_side=None), 14)
    cropped = prepare_image(photo, ImageSpec(shorter_side=None, crop="patch"), 14)
    assert cropped.pixels.shape == (294, 448, 3)
    np.testing.assert_array_equal(cropped.pixels, whole.pixels[:294, :448])
    assert (cropped.scale_y, cropped.scale_x, cropped.width, cropped.height) == (1, 1, 451, 300)


def test_bytes_image_and_array_agree(photo: Image.Image) -> None:
    file = io.BytesIO()
    photo.save(file, "PNG")
    expected = prepare_image(photo, ImageSpec(), 16).pixels
    np.testing.assert_array_equal(prepare_image(file.getvalue(), ImageSpec(), 16).pixels, expected)
    np.testing.assert_array_equal(prepare_image(np.asarray(photo), ImageSpec(), 16).pixels, expected)


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((8, 200, 3), ImageSpec(shorter_side=None), "less than one 16 x 16 patch"),
        ((1, 5000, 3), ImageSpec(max_pixels=10_000_000), "resized to 1120000 x 224 pixels, more than the 10,000,000"),
        ((0, 10, 3), ImageSpec(), "no pixels"),
        ((32, 32), ImageSpec(), r"\(height, width, 3\) uint8"),
    ],
)
def test_unusable_arrays(shape: tuple[int, ...], spec: ImageSpec, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        prepare_image(np.zeros(shape, np.uint8), spec, 16)


def test_float_arrays_are_refused() -> None:
    with pytest.raises(ImageError, match="float32"):
        prepare_image(np.zeros((32, 32, 3), np.float32), ImageSpec(), 16)


def test_specs_that_make_no_sense() -> None:
    for wrong in ({"shorter_side": 0}, {"size_hw": (0, 5)}, {"resample": "nearest"}, {"crop": "centre"}):
        with pytest.raises(ValueError):
            ImageSpec(**wrong)


def test_patch_centres_are_means_of_the_pixels_of_a_patch() -> None:
    """The patch embedding of an image of coordinates, with averaging weights, is the centre of each patch."""
    height, width, patch, stride = 50, 61, 14, 7
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    centres = torch.nn.functional.avg_pool2d(torch.from_numpy(np.stack([y, x])), patch, stride).numpy()
    ours = patch_centres(centres.shape[1:], stride, patch, scale_y=1, scale_x=1)
    np.testing.assert_allclose(ours, centres, rtol=1e-6)
    scaled_y, scaled_x = patch_centres(centres.shape[1:], stride, patch, scale_y=2, scale_x=0.5)
    np.testing.assert_allclose((scaled_y, scaled_x), (centres[0] * 2, centres[1] * 0.5), rtol=1e-6)
    assert scaled_y.dtype == scaled_x.dtype == np.float32
