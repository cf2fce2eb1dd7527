"""Multi-crop augmentation against torchvision's operations with the same draws, and against its own probabilities."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter

from dino_ops.multicrop import Crops, MultiCrop, centre_crop, colour_jitter, random_resized_crop, shift_hue
from dino_ops.recipe import Recipe

BICUBIC = T.InterpolationMode.BICUBIC
SIZES = [(451, 300), (300, 451), (64, 64), (97, 31), (31, 98), (5000, 1), (1, 5000), (7, 5), (2, 1), (1, 1)]


@pytest.fixture(scope="module")
def pictures(photo: Image.Image) -> list[Image.Image]:
    """Photographs of many shapes, (width, height) as in SIZES."""
    return [photo.resize(size) for size in SIZES]


def published_box(width: int, height: int, scale: tuple[float, float], draw: np.random.Generator) -> list[int]:
    """torchvision's RandomResizedCrop.get_params with our generator: top, left, height, width."""
    for _ in range(10):
        area = width * height * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1)), h, w]
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


def published_jitter(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    """torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1) with our generator."""
    for operation in draw.permutation(4):
        if operation == 0:
            image = F.adjust_brightness(image, draw.uniform(0.6, 1.4))
        elif operation == 1:
            image = F.adjust_contrast(image, draw.uniform(0.6, 1.4))
        elif operation == 2:
            image = F.adjust_saturation(image, draw.uniform(0.8, 1.2))
        else:
            image = F.adjust_hue(image, draw.uniform(-0.1, 0.1))
    return image


def published_crop(
    image: Image.Image, kind: int, size: int, draw: np.random.Generator, radii: tuple[float, float] = (0.1, 2.0)
) -> np.ndarray:
    """A crop made of torchvision's operations, in the published order. kind: 0, 1 global, 2 local."""
    scale = (0.05, 0.4) if kind == 2 else (0.4, 1.0)
    crop = F.resized_crop(image, *published_box(*image.size, scale, draw), [size, size], BICUBIC)
    if draw.random() < 0.5:
        crop = F.hflip(crop)
    if draw.random() < 0.8:
        crop = published_jitter(crop, draw)
    if draw.random() < 0.2:
        crop = F.to_grayscale(crop, num_output_channels=3)
    if draw.random() < (1.0, 0.1, 0.5)[kind]:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=draw.uniform(*radii)))
    if kind == 1 and draw.random() < 0.2:
        crop = F.solarize(crop, 128)
    return np.asarray(crop)


def test_crops_are_torchvisions_operations_with_the_same_draws(pictures: list[Image.Image]) -> None:
    multicrop = MultiCrop(global_size=224, local_size=96, local_crops=3)
    for seed, picture in enumerate(pictures * 2):
        crops, draw = multicrop(picture, np.random.default_rng(seed)), np.random.default_rng(seed)
        for kind in range(2):
            np.testing.assert_array_equal(crops.whole[kind, 0], published_crop(picture, kind, 224, draw))
        for local in crops.local[:, 0]:
            np.testing.assert_array_equal(local, published_crop(picture, 2, 96, draw))


def test_smaller_crops_are_blurred_in_proportion(pictures: list[Image.Image]) -> None:
    multicrop = MultiCrop(global_size=56, local_size=20, local_crops=2)
    radii = (0.1 / 4, 2.0 / 4)
    for picture in pictures:
        for seed in range(5):
            crops, draw = multicrop(picture, np.random.default_rng(seed)), np.random.default_rng(seed)
            for kind in range(2):
                np.testing.assert_array_equal(crops.whole[kind, 0], published_crop(picture, kind, 56, draw, radii))
            for local in crops.local[:, 0]:
                np.testing.assert_array_equal(local, published_crop(picture, 2, 20, draw, radii))


def test_each_colour_operation_is_torchvisions(photo: Image.Image) -> None:
    for turns in (-0.5, -0.1, -0.003, 0.0, 0.05, 0.1, 0.5):
        np.testing.assert_array_equal(shift_hue(photo, turns), F.adjust_hue(photo, turns))
    for seed in range(5):
        ours = colour_jitter(photo, (0.4, 0.4, 0.2, 0.1), np.random.default_rng(seed))
        np.testing.assert_array_equal(ours, published_jitter(photo, np.random.default_rng(seed)))
    black = colour_jitter(photo, (1e9, 0, 0, 0), np.random.default_rng(0))  # factors are never negative
    assert np.asarray(black).min() >= 0 and np.asarray(black).max() == 255


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """What is cut out of images: left, top, right, bottom."""
    seen: list[tuple[int, int, int, int]] = []
    cut = Image.Image.crop

    def crop(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        seen.append(box)
        return cut(image, box)

    monkeypatch.setattr(Image.Image, "crop", crop)
    return seen


@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_areas_shapes_and_places_of_crops(boxes: list[tuple[int, int, int, int]], scale: tuple[float, float]) -> None:
    image, generator = Image.new("RGB", (600, 600)), np.random.default_rng(5)
    for _ in range(800):
        random_resized_crop(image, 2, scale, generator)
    left, top, right, bottom = np.array(boxes).T
    width, height = right - left, bottom - top
    share, ratio = width * height / 600**2, width / height
    assert scale[0] * 0.99 < share.min() and share.max() < scale[1] * 1.01
    assert 3 / 4 * 0.99 < ratio.min() < 0.78 and 1.29 < ratio.max() < 4 / 3 * 1.01
    assert left.min() >= 0 and right.max() <= 600 and top.min() >= 0 and bottom.max() <= 600
    assert abs(np.log(ratio).mean()) < 0.03  # lying as often as standing
    for start, length in ((left, width), (top, height)):
        # (start + half) / (number of starts) is uniform, whatever the length
        assert scipy.stats.kstest((start + 0.5) / (601 - length), "uniform").pvalue > 0.01
    if scale[1] < 0.7:  # every drawn shape fits, so nothing was drawn again
        uniform = scipy.stats.uniform(scale[0], scale[1] - scale[0])
        assert scipy.stats.kstest(share, uniform.cdf).pvalue > 0.01
        logarithms = scipy.stats.uniform(math.log(3 / 4), math.log(16 / 9))
        assert scipy.stats.kstest(np.log(ratio), logarithms.cdf).pvalue > 0.01


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (900, 30), (30, 900), (100, 2)])
def test_images_into_which_no_drawn_shape_fits(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> None:
    width, height = size
    random_resized_crop(Image.new("RGB", size), 4, (0.4, 1.0), np.random.default_rng(0))
    ((left, top, right, bottom),) = boxes
    if width > height:
        assert (right - left, bottom - top) == (round(height * 4 / 3), height)
    else:
        assert (right - left, bottom - top) == (width, round(width * 4 / 3))
    assert abs(left - (width - right)) <= 1 and abs(top - (height - bottom)) <= 1  # in the middle


def test_how_often_crops_are_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A red and a blue half of an image that is always cropped whole say what has been done to it."""
    monkeypatch.setattr("dino_ops.multicrop.PUBLISHED_GLOBAL_SIZE", 32)  # blurred as whole crops are
    image = Image.new("RGB", (32, 32), (250, 130, 3))
    image.paste((10, 20, 200), (16, 0, 32, 32))
    # strengths of 0 leave hue's way through HSV, which rounds these colours
    multicrop = MultiCrop(32, 32, 1, (1.0, 1.0), (1.0, 1.0), jitter=(0, 0, 0, 0))

    outcomes: dict[bytes, tuple[bool, bool, bool, bool]] = {}
    for flip, jitter, grey, solarise in product((False, True), repeat=4):
        changed = F.hflip(image) if flip else image
        changed = F.adjust_hue(changed, 0) if jitter else changed
        changed = F.to_grayscale(changed, 3) if grey else changed
        changed = F.solarize(changed, 128) if solarise else changed
        outcomes[_halves(np.asarray(changed))] = (flip, jitter, grey, solarise)
    assert len(outcomes) == 16

    draws, generator = 1000, np.random.default_rng(1)
    expected = {  # flip, jitter, grey, solarise, blur
        "first global": (0.5, 0.8, 0.2, 0.0, 1.0),
        "second global": (0.5, 0.8, 0.2, 0.2, 0.1),
        "local": (0.5, 0.8, 0.2, 0.0, 0.5),
    }
    counts = np.zeros((3, 5))
    for _ in range(draws):
        crops = multicrop(image, generator)
        for kind, crop in enumerate([*crops.whole[:, 0], crops.local[0, 0]]):
            blurred = (crop[:, 15] != crop[:, 0]).any() or (crop[:, 16] != crop[:, 31]).any()
            counts[kind] += [*outcomes[_halves(crop)], blurred]
    for kind, probabilities in enumerate(expected.values()):
        for counted, probability in zip(counts[kind] / draws, probabilities, strict=True):
            # the smallest blurs, of radius 0.1 to 0.2, may change no pixel
            slack = 4 * math.sqrt(probability * (1 - probability) / draws) + (0.07 if probability == 1 else 0)
            assert abs(counted - probability) <= slack, (list(expected)[kind], counts[kind] / draws)


def _halves(crop: np.ndarray) -> bytes:
    """Colours of its left and right edge, where no blur reaches."""
    return crop[16, 0].tobytes() + crop[16, 31].tobytes()


def test_shapes_and_the_generator_decides(photo: Image.Image) -> None:
    multicrop = MultiCrop(global_size=32, local_size=16, local_crops=4)
    first, again = (multicrop(photo, np.random.default_rng(3)) for _ in range(2))
    other = multicrop(photo, np.random.default_rng(4))
    assert first.whole.shape == (2, 1, 32, 32, 3) and first.local.shape == (4, 1, 16, 16, 3)
    assert first.whole.dtype == first.local.dtype == np.uint8
    np.testing.assert_array_equal(first.whole, again.whole)
    np.testing.assert_array_equal(first.local, again.local)
    assert (first.whole != other.whole).any() and (first.whole[0] != first.whole[1]).any()
    assert MultiCrop(local_crops=0, local_size=16)(photo, np.random.default_rng(3)).local.shape == (0, 1, 16, 16, 3)
    assert MultiCrop() == MultiCrop(224, 96, 8, (0.4, 1.0), (0.05, 0.4), (0.4, 0.4, 0.2, 0.1))  # as published


@pytest.mark.parametrize("local_crops", [0, 3])
def test_joining_and_splitting_batches(photo: Image.Image, local_crops: int) -> None:
    multicrop = MultiCrop(8, 4, local_crops)
    each = [multicrop(photo, np.random.default_rng(seed)) for seed in range(5)]
    batch = Crops.joined(each)
    assert batch.images == 5 and batch.local.shape == (local_crops, 5, 4, 4, 3)
    some = batch.of(slice(1, 3))
    assert some.images == 2
    for at in range(2):
        np.testing.assert_array_equal(some.whole[:, at], each[1 + at].whole[:, 0])
        np.testing.assert_array_equal(some.local[:, at], each[1 + at].local[:, 0])
    assert Crops.joined([batch]) is batch


@pytest.mark.parametrize("size", [224, 96, 112, 63, 64, 33])
def test_the_middle_is_torchvisions(photo: Image.Image, size: int) -> None:
    resize = T.Resize(round(256 / 224 * size), BICUBIC)
    evaluation = T.Compose([resize, T.CenterCrop(size)])
    for shape in [(451, 300), (300, 451), (200, 200), (301, 300), (640, 111), (7, 5), (1, 1)]:
        image = photo.resize(shape)
        middle = centre_crop(image, size)
        assert middle.shape == (size, size, 3) and middle.dtype == np.uint8
        np.testing.assert_array_equal(middle, evaluation(image))


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (61, 1), (3, 90)])
def test_the_middle_of_a_strip_is_nearly_torchvisions(shape: tuple[int, int]) -> None:
    """Its ends are cut off first; what is seen of it moves by half a pixel of the strip at most."""
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    rows = ramp[None, :, None] if shape[0] > shape[1] else ramp[:, None, None]
    image = Image.fromarray(np.broadcast_to(rows, (shape[1], shape[0], 3)).copy())
    evaluation = T.Compose([T.Resize(32, BICUBIC), T.CenterCrop(28)])
    difference = centre_crop(image, 28).astype(int) - np.asarray(evaluation(image)).astype(int)
    assert np.abs(difference).max() <= math.ceil(255 / max(shape))


def test_the_middle_of_a_strip_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, resize = [], Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        sizes.append(size)
        return resize(image, size, resample)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for shape in ((1, 50000), (50000, 1)):
        middle = centre_crop(Image.new("RGB", shape, (9, 8, 7)), 28)
        assert middle.shape == (28, 28, 3) and (middle == (9, 8, 7)).all()
    assert all(max(size) <= 32 * 32 for size in sizes) and len(sizes) == 2


@pytest.mark.parametrize(("global_size", "local_size", "patch"), [(224, 96, 16), (128, 48, 8), (518, 98, 14)])
def test_crops_that_grow(global_size: int, local_size: int, patch: int) -> None:
    whole = MultiCrop(global_size, local_size, local_crops=6, jitter=(0.1, 0.1, 0.1, 0.1))
    recipe = Recipe(epochs=40, multicrop=whole, growing_from=0.5)
    by_epoch = [recipe.multicrop_at(epoch, patch) for epoch in range(40)]
    for name, size in (("global_size", global_size), ("local_size", local_size)):
        sizes = [getattr(multicrop, name) for multicrop in by_epoch]
        assert all(one % patch == 0 for one in sizes) and sizes == sorted(sizes)
        assert abs(sizes[0] - size / 2) <= patch / 2
        assert abs(sizes[15] - size * 0.75) <= patch / 2  # half the way
        assert len(set(sizes)) >= 3
    assert all(multicrop is whole for multicrop in by_epoch[30:]) and by_epoch[0] != whole
    assert {multicrop.local_crops for multicrop in by_epoch} == {6}
    assert {multicrop.jitter for multicrop in by_epoch} == {whole.jitter}


def test_crops_that_do_not_grow_and_crops_of_no_patch() -> None:
    recipe = Recipe(epochs=5)
    assert all(recipe.multicrop_at(epoch, 16) is recipe.multicrop for epoch in range(5))
    small = Recipe(epochs=8, multicrop=MultiCrop(32, 16), growing_from=0.1).multicrop_at(0, 16)
    assert (small.global_size, small.local_size) == (16, 16)
    for start in (0.1, 0.3, 0.7, 1 / 3):  # no rounding keeps the last quarter from being whole
        grown = Recipe(epochs=100, growing_from=start)
        assert grown.multicrop_at(75, 16) is grown.multicrop
