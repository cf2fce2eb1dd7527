"""Segmentation scores against loops over pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from dino_ops.segmentation_metrics import box_iou, jaccard, localised, mask_box, pixel_precision


def blobs(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((13, 17)) < 0.45


def pixels(mask: np.ndarray) -> set[tuple[int, int]]:
    return {(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]}


def components(mask: np.ndarray) -> Iterator[set[tuple[int, int]]]:
    """Connected through sides, in raster order of their first pixel, by flooding."""
    left = pixels(mask)
    while left:
        flood = [min(left)]
        left.discard(flood[0])
        for y, x in flood:
            for beside in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if beside in left:
                    left.discard(beside)
                    flood.append(beside)
        yield set(flood)


def box_around(inside: set[tuple[int, int]]) -> list[int]:
    ys, xs = [y for y, _ in inside], [x for _, x in inside]
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


@pytest.mark.parametrize("seed", range(5))
def test_jaccard_and_precision_count_pixels(seed: int) -> None:
    mask, truth = blobs(seed), blobs(seed + 100)
    a, b = pixels(mask), pixels(truth)
    assert jaccard(mask, truth) == len(a & b) / len(a | b)
    right = sum(mask[y, x] == truth[y, x] for y in range(13) for x in range(17))
    assert pixel_precision(mask, truth) == pytest.approx(right / (13 * 17))
    assert jaccard(mask * np.uint8(255), truth.astype(float)) == jaccard(mask, truth)


@pytest.mark.parametrize("seed", range(20))
def test_boxes(seed: int) -> None:
    mask = blobs(seed)
    largest = max(components(mask), key=len)
    assert mask_box(mask).tolist() == box_around(largest)
    assert mask_box(mask, around="mask").tolist() == box_around(pixels(mask))


@pytest.mark.parametrize("seed", range(20))
def test_box_iou_counts_pixels(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, last = np.sort(generator.integers(0, 12, (2, 2, 2)), axis=0)
    a, b = np.concatenate([first, last + 1], axis=1)
    inside = [{(y, x) for y in range(box[1], box[3]) for x in range(box[0], box[2])} for box in (a, b)]
    assert box_iou(a, b) == pytest.approx(len(inside[0] & inside[1]) / len(inside[0] | inside[1]))


def test_localised_from_half_the_union() -> None:
    mask = np.zeros((10, 10), bool)
    mask[2:6, 3:7] = True  # 4 x 4
    mask[9, 9] = True  # another component
    half, less = [3, 2, 7, 10], [3, 2, 7, 11]  # 16 of 32 pixels, and of 36
    assert localised(mask, np.array([half]))
    assert not localised(mask, np.array([less]))
    assert localised(mask, np.array([less, half]))
    assert not localised(mask, np.array([[3, 2, 7, 6]]), around="mask")
    assert not localised(mask, np.zeros((0, 4)))


def test_empty_masks() -> None:
    empty, some = np.zeros((4, 5), bool), np.eye(4, 5, dtype=bool)
    assert jaccard(empty, empty) == 1
    assert jaccard(empty, some) == jaccard(some, empty) == 0
    assert pixel_precision(empty, empty) == 1
    assert math.isnan(pixel_precision(np.zeros((0, 5)), np.zeros((0, 5))))
    assert mask_box(empty) is None
    assert not localised(empty, np.array([[0, 0, 5, 4]]))
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(5, 4\)"):
        jaccard(empty, empty.T)


def test_equal_components_first_in_raster_order() -> None:
    mask = np.zeros((5, 5), bool)
    mask[0, 3:5] = mask[4, 0:2] = True
    assert mask_box(mask).tolist() == [3, 0, 5, 1]
