"""Parts against the published code's, and on generated scenes whose parts are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from dino_ops.cosegmentation import ForegroundModel, fit_foreground
from dino_ops.parts import (
    PartModel,
    fit_common_parts,
    fit_parts,
    nearest_parts,
    part_distances,
    parts_of_patches,
    smooth_parts,
)
from dino_ops.published_kmeans import FaissKMeans

PATCH = 8  # pixels
COLOURS = np.array([[220, 30, 30], [30, 200, 40], [30, 40, 210], [200, 200, 40], [120, 120, 120], [20, 20, 20]])


def scenes(count: int, distractor_in: int = 0, seed: int = 0) -> tuple[list, list, list, list]:
    """Images of an object of parts 0 and 1 (and in the first `distractor_in`, something salient of kind 2) before a
    background of kinds 4 and 5: descriptors, saliency, pixels, kinds.
    """
    generator = np.random.default_rng(seed)
    directions = np.eye(8)[:6]
    directions[:3] += np.eye(8)[6]  # the object's kinds have something in common
    descriptors, saliency, pixels, kinds = [], [], [], []
    for number in range(count):
        kind = np.where(np.arange(14)[:, None] < 7, 4, 5) * np.ones((1, 16), int)
        top, left = generator.integers(1, 6, 2)
        kind[top : top + 6, left : left + 3], kind[top : top + 6, left + 3 : left + 6] = 0, 1
        if number < distractor_in:
            kind[top : top + 6, left + 7 : left + 10] = 2
        descriptors.append((directions[kind] + 0.03 * generator.standard_normal((14, 16, 8))).astype(np.float32) * 3)
        saliency.append(np.where(kind < 4, 0.6, 0.01))
        pixels.append(COLOURS[kind].repeat(PATCH, axis=0).repeat(PATCH, axis=1).astype(np.uint8))
        kinds.append(kind)
    return descriptors, saliency, pixels, kinds


def foreground_of(descriptors: list, saliency: list, **changes: object) -> ForegroundModel:
    return fit_foreground(descriptors, saliency, **({"sample_interval": 3} | changes))


def three_at_most(points: np.ndarray, k: int) -> np.ndarray:
    """So that the second stage's clusters are the kinds: an elbow stops one cluster later and splits one of them."""
    return FaissKMeans()(points, min(k, 3))


def agreement(labels: list[np.ndarray], truth: list[np.ndarray]) -> float:
    return normalized_mutual_info_score(np.concatenate(truth, axis=None), np.concatenate(labels, axis=None))


@pytest.mark.parametrize("backend", ["numpy", "pydensecrf"])
def test_the_published_codes_parts(cows, backend) -> None:
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf", reason="the extra crf is not installed")
    foreground = fit_foreground(cows.descriptors, cows.saliency, **cows.fitting)
    model = fit_parts(
        foreground,
        cows.descriptors,
        num_parts=cows.settings["num_parts"],
        sample_interval=cows.settings["sample_interval"],
    )
    scores = [
        normalized_mutual_info_score(published.ravel(), smooth_parts(model, descriptor, pixels, backend).ravel())
        for descriptor, pixels, published in zip(cows.descriptors, cows.pixels, cows.parts, strict=True)
    ]
    assert min(scores) >= 0.97


def test_two_stages() -> None:
    descriptors, saliency, pixels, kinds = scenes(4)
    model = fit_parts(foreground_of(descriptors, saliency), descriptors, num_parts=2, sample_interval=3)
    assert model.notes == ()
    truth = [np.where(kind < 2, kind, -1) for kind in kinds]
    assert agreement([nearest_parts(model, descriptor) for descriptor in descriptors], truth) == pytest.approx(1)
    fine = [one.repeat(PATCH, axis=0).repeat(PATCH, axis=1) for one in truth]
    smooth = [smooth_parts(model, *pair, "numpy") for pair in zip(descriptors, pixels, strict=True)]
    assert agreement(smooth, fine) > 0.97
    grids = [parts_of_patches(labels, (14, 16)) for labels in smooth]
    assert agreement(grids, truth) > 0.95


@pytest.mark.parametrize("smoothed", [True, False])
def test_the_third_stage_drops_what_not_every_image_has(smoothed: bool) -> None:
    descriptors, saliency, pixels, kinds = scenes(5, distractor_in=4)
    foreground = foreground_of(descriptors, saliency)
    two = fit_parts(foreground, descriptors, num_parts=3, sample_interval=3)
    assert np.unique(nearest_parts(two, descriptors[0])[kinds[0] == 2]).min() >= 0  # it is a part in two stages
    three = fit_common_parts(
        foreground,
        descriptors,
        pixels if smoothed else None,
        num_parts=2,
        sample_interval=3,
        kmeans=three_at_most,
        crf="numpy",
    )
    assert len(three.background) > len(two.background)
    truth = [np.where(kind < 2, kind, -1) for kind in kinds]
    assert agreement([nearest_parts(three, descriptor) for descriptor in descriptors], truth) == pytest.approx(1)


def test_crops_join_but_do_not_say_what_is_common() -> None:
    descriptors, saliency, _, _ = scenes(6, distractor_in=4)
    foreground = foreground_of(descriptors, [*saliency[:4], None, None], votes_percentage=50)
    counts = []
    for originals in ([True] * 4 + [False] * 2, None):
        model = fit_common_parts(foreground, descriptors, None, originals, elbow_second_stage=0.9, sample_interval=3)
        counts.append(len(model.background))
    assert counts[0] < counts[1]  # without the last two, what the first four have besides is common


def test_images_without_any_part_do_not_keep_others_from_having_them() -> None:
    descriptors, saliency, _, kinds = scenes(5)
    descriptors[4] = descriptors[4][:1, :1].repeat(14, axis=0).repeat(16, axis=1)  # nothing but background
    saliency[4] = np.zeros((14, 16))
    foreground = foreground_of(descriptors, saliency)
    model = fit_common_parts(foreground, descriptors, None, num_parts=2, sample_interval=3)
    assert len(model.centroids) == 2 and model.notes == ()
    assert (nearest_parts(model, descriptors[4]) == -1).all()
    assert agreement([nearest_parts(model, descriptors[0])], [np.where(kinds[0] < 2, kinds[0], -1)]) > 0.99


def test_nothing_in_common() -> None:
    """Two images whose foregrounds are of different kinds."""
    descriptors, saliency, pixels, kinds = scenes(2)
    foreground = foreground_of(descriptors, saliency, votes_percentage=50)
    for number, kind in enumerate(kinds):
        background = descriptors[number][0, 0]
        descriptors[number][kind == 1 - number] = background
    model = fit_common_parts(foreground, descriptors, None, elbow_second_stage=0.9, sample_interval=3)
    assert len(model.centroids) == 0
    assert "is in every image, so there are no parts" in model.notes[-1]
    assert (smooth_parts(model, descriptors[0], pixels[0]) == -1).all()


def test_no_foreground() -> None:
    descriptors, saliency, pixels, _ = scenes(3)
    nothing = foreground_of(descriptors, [np.zeros_like(one) for one in saliency])
    for model in (fit_parts(nothing, descriptors), fit_common_parts(nothing, descriptors, pixels)):
        assert model.centroids.shape == (0, 8) and model.notes == nothing.notes
        assert "no salient cluster" in model.notes[0]
        assert (nearest_parts(model, descriptors[0]) == -1).all()
        assert (smooth_parts(model, descriptors[0], pixels[0]) == -1).all()
    # a foreground, but not in these images
    only_background = [descriptor[:1] for descriptor in descriptors]
    model = fit_parts(foreground_of(descriptors, saliency), only_background)
    assert model.notes == ("no patch of these images is foreground, so there are no parts",)


def test_no_background() -> None:
    descriptors, _, pixels, kinds = scenes(3)
    everything = foreground_of(descriptors, [np.ones((14, 16))] * 3)
    assert "there is no background" in everything.notes[0]
    model = fit_parts(everything, descriptors, num_parts=4, sample_interval=3)
    assert len(model.background) == 0
    assert part_distances(model, descriptors[0]).shape == (4, 14, 16)
    assert agreement([nearest_parts(model, descriptor) for descriptor in descriptors], kinds) > 0.99
    assert smooth_parts(model, descriptors[0], pixels[0], "numpy").min() == 0
    alone = fit_parts(everything, descriptors, num_parts=1, sample_interval=3)
    assert (smooth_parts(alone, descriptors[0], pixels[0], "numpy") == 0).all()


def test_more_parts_than_descriptors() -> None:
    descriptors, saliency, pixels, _ = scenes(2)
    foreground = foreground_of(descriptors, saliency)
    model = fit_parts(foreground, descriptors, num_parts=9, sample_interval=100)
    assert len(model.centroids) == 2
    assert model.notes == ("only 2 descriptors to cluster, so as many parts instead of 9",)
    assert set(np.unique(smooth_parts(model, descriptors[0], pixels[0]))) <= {-1, 0, 1}
    with pytest.raises(ValueError, match="num_parts is at least 1, not 0"):
        fit_parts(foreground, descriptors, num_parts=0)
    with pytest.raises(ValueError, match="elbow"):
        fit_common_parts(foreground, descriptors, pixels, elbow_second_stage=0)


def test_one_image() -> None:
    descriptors, saliency, _, kinds = scenes(1)
    foreground = foreground_of(descriptors, saliency, sample_interval=1)
    model = fit_common_parts(foreground, descriptors, None, num_parts=2, sample_interval=1)
    labels = nearest_parts(model, descriptors[0])
    assert agreement([labels], [np.where(kinds[0] < 2, kinds[0], -1)]) > 0.99


def test_distances_are_of_unit_descriptors() -> None:
    descriptors, saliency, _, _ = scenes(2)
    model = fit_parts(foreground_of(descriptors, saliency), descriptors, num_parts=2, sample_interval=3)
    rows = descriptors[0].reshape(-1, 8).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = [((rows - centroid) ** 2).sum(axis=1) for centroid in model.centroids.astype(np.float64)]
    expected.append(np.min([((rows - centroid) ** 2).sum(axis=1) for centroid in model.background], axis=0))
    np.testing.assert_allclose(part_distances(model, descriptors[0]).reshape(3, -1), expected, atol=1e-5)


def test_a_model_is_plain_arrays(tmp_path: Path) -> None:
    descriptors, saliency, _, _ = scenes(2)
    model = fit_parts(foreground_of(descriptors, saliency), descriptors, num_parts=9)
    np.savez(tmp_path / "parts.npz", **model.to_arrays())
    with np.load(tmp_path / "parts.npz") as arrays:
        back = PartModel.from_arrays(arrays)
    assert back.notes == model.notes != ()
    np.testing.assert_array_equal(nearest_parts(back, descriptors[1]), nearest_parts(model, descriptors[1]))


@pytest.mark.parametrize("shape", [(19, 29, 160, 240), (27, 41, 224, 336), (30, 30, 250, 250), (160, 240, 19, 29)])
def test_nearest_as_torch_rounds(shape: tuple[int, int, int, int]) -> None:
    height, width, to_height, to_width = shape
    labels = np.arange(height * width, dtype=np.int32).reshape(height, width)
    torchs = torch.nn.functional.interpolate(
        torch.from_numpy(labels)[None, None].double(), size=(to_height, to_width), mode="nearest"
    )
    np.testing.assert_array_equal(parts_of_patches(labels, (to_height, to_width)), torchs[0, 0].int().numpy())
