"""Co-segmentation against the published code's masks, against loops, and on sets that it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans as ScikitKMeans

from dino_ops import Extractor
from dino_ops.cosegmentation import (
    ForegroundModel,
    assign_clusters,
    fit_foreground,
    foreground_patches,
    inliers,
    mean_saliency,
    sample_rows,
)
from dino_ops.mask_refinement import grabcut, resize_mask
from dino_ops.published_kmeans import FaissKMeans, cluster_by_elbow, nearest_centroids, squared_distances, unit_rows

NoiseMap = Callable[..., np.ndarray]


def scikit_kmeans(points: np.ndarray, k: int) -> np.ndarray:
    return ScikitKMeans(k, n_init=3, random_state=0).fit(points).cluster_centers_.astype(np.float32)


def scenes(count: int, size: int = 12, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Images with an object of two halves before a background of two: descriptors, saliency, where the object is."""
    generator = np.random.default_rng(seed)
    kinds = np.eye(8, dtype=np.float32)[:4]
    descriptors, saliency, objects = [], [], []
    for _ in range(count):
        labels = np.where(np.arange(size)[:, None] < size // 2, 2, 3) * np.ones((1, size), int)
        top, left = generator.integers(1, size // 2, 2)
        labels[top : top + 4, left : left + 3] = 0
        labels[top : top + 4, left + 3 : left + 5] = 1
        noise = 0.05 * generator.standard_normal((size, size, 8))
        descriptors.append(((kinds[labels] + noise) * generator.uniform(1, 9, (size, size, 1))).astype(np.float32))
        saliency.append(np.where(labels < 2, 0.5, 0.02) + generator.uniform(0, 0.02, (size, size)))
        objects.append(labels < 2)
    return descriptors, saliency, objects


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_the_published_codes_masks(cows) -> None:
    model = fit_foreground(cows.descriptors, cows.saliency, **cows.fitting)
    assert model.notes == ()
    scores = []
    for descriptor, pixels, published in zip(cows.descriptors, cows.pixels, cows.masks, strict=True):
        ours = grabcut(foreground_patches(model, descriptor), pixels)
        assert ours.refined
        scores.append(intersection_over_union(ours.mask, published))
    assert np.mean(scores) >= 0.99
    assert min(scores) >= 0.95


def test_channels_in_another_order_change_nothing(cows) -> None:
    order = np.random.default_rng(0).permutation(cows.descriptors[0].shape[-1])
    model = fit_foreground(cows.descriptors, cows.saliency, **cows.fitting)
    other = fit_foreground([d[..., order] for d in cows.descriptors], cows.saliency, **cows.fitting)
    for descriptor in cows.descriptors:
        ours, theirs = foreground_patches(model, descriptor), foreground_patches(other, descriptor[..., order])
        assert intersection_over_union(ours, theirs) >= 0.98


@pytest.mark.slow
def test_msrc_cows(data_dir: Path) -> None:
    """30 photos as the published code was run on them: Jaccard 0.734, precision 0.929."""
    photos = sorted((data_dir / "msrc-cow" / "images").iterdir())
    extractor = Extractor(
        "deit_tiny_patch16_224",
        data_dir / "weights" / "deit_tiny_patch16_224_state_dict.pth",
        stride=8,
        device="cpu",
    )
    prepared = [extractor.prepare(photo) for photo in photos]
    features = extractor.extract(prepared)
    descriptors = [image.descriptor for image in features]
    model = fit_foreground(descriptors, [image.saliency for image in features])
    jaccard, precision = [], []
    for photo, image, one in zip(photos, features, prepared, strict=True):
        mask = grabcut(foreground_patches(model, image.descriptor), one.pixels).mask
        ours = resize_mask(mask, image.height, image.width)
        truth = np.asarray(Image.open(data_dir / "msrc-cow" / "masks" / photo.name).convert("L")) > 0
        jaccard.append(intersection_over_union(ours, truth))
        precision.append((ours == truth).mean())
    assert np.mean(jaccard) >= 0.7335, f"Jaccard {np.mean(jaccard):.4f}, precision {np.mean(precision):.4f}"
    assert np.mean(precision) >= 0.9285


@pytest.mark.parametrize("kmeans", [FaissKMeans(), scikit_kmeans])
def test_generated_scenes(kmeans) -> None:
    descriptors, saliency, objects = scenes(5)
    model = fit_foreground(descriptors, saliency, sample_interval=3, kmeans=kmeans)
    assert model.voters == 5
    assert np.isin(model.votes, [0, 5]).all()
    for descriptor, truth in zip(descriptors, objects, strict=True):
        np.testing.assert_array_equal(foreground_patches(model, descriptor), truth)
    unseen, _, truths = scenes(3, seed=9)  # a model fitted on some images assigns others
    for descriptor, truth in zip(unseen, truths, strict=True):
        np.testing.assert_array_equal(foreground_patches(model, descriptor), truth)


def test_half_precision_and_read_only_maps() -> None:
    descriptors, saliency, objects = scenes(4)
    halves = [descriptor.astype(np.float16) for descriptor in descriptors]
    for array in halves + saliency:
        array.flags.writeable = False
    model = fit_foreground(halves, saliency, sample_interval=3)
    assert model.centroids.dtype == np.float32
    for descriptor, truth in zip(halves, objects, strict=True):
        np.testing.assert_array_equal(foreground_patches(model, descriptor), truth)


def test_a_model_is_plain_arrays(tmp_path: Path) -> None:
    descriptors, saliency, _ = scenes(4)
    no_object = [np.zeros_like(one) for one in saliency]
    for maps in (saliency, no_object):
        model = fit_foreground(descriptors, maps, sample_interval=3)
        np.savez(tmp_path / "model.npz", **model.to_arrays())
        with np.load(tmp_path / "model.npz") as arrays:
            back = ForegroundModel.from_arrays(arrays)
        assert back.notes == model.notes and back.voters == model.voters
        np.testing.assert_array_equal(
            foreground_patches(back, descriptors[0]), foreground_patches(model, descriptors[0])
        )
        for name in ("centroids", "votes", "salient", "objectives"):
            np.testing.assert_array_equal(getattr(back, name), getattr(model, name))


def test_maps_without_saliency_join_but_do_not_vote() -> None:
    descriptors, saliency, _ = scenes(6)
    model = fit_foreground(descriptors, [*saliency[:2], None, None, None, None], sample_interval=3)
    assert model.voters == 2 and model.votes.max() == 2
    silent = fit_foreground(descriptors, [None] * 6, sample_interval=3)
    assert not silent.salient.any() and silent.notes == ("no image can vote, so there is no foreground",)
    np.testing.assert_array_equal(silent.centroids, model.centroids)


def test_votes_needed_are_rounded_up() -> None:
    """Of five images four have the object; 75 % of five is 3.75, so four votes are needed."""
    descriptors, saliency, _ = scenes(5)
    background, _, _ = scenes(5)
    background[0][:] = background[0][0, 0]  # nothing but one kind of background
    descriptors[0], saliency[0] = background[0], np.zeros_like(saliency[0])
    assert fit_foreground(descriptors, saliency, sample_interval=3).salient.any()
    descriptors[1], saliency[1] = background[0], np.zeros_like(saliency[0])
    lost = fit_foreground(descriptors, saliency, sample_interval=3)
    assert not lost.salient.any()
    assert "no salient cluster" in lost.notes[0] and "3 of 5 images, 4 are needed" in lost.notes[0]
    assert not foreground_patches(lost, descriptors[3]).any()
    # an image that is all background in a set that has foreground
    assert not foreground_patches(fit_foreground(*scenes(4)[:2], sample_interval=3), descriptors[1]).any()


def test_relative_votes() -> None:
    """Saliency that is high everywhere, or low everywhere, is no obstacle; nor is an object that few images have."""
    descriptors, saliency, objects = scenes(6)
    other, _, _ = scenes(6)
    for number in range(4):
        descriptors[number] = other[number][:1].repeat(12, axis=0)  # one kind of background
        saliency[number] = np.full((12, 12), 0.01)
    for scale, shift in ((1, 0), (0.05, 0), (0.5, 0.4)):
        maps = [scale * one + shift for one in saliency]
        model = fit_foreground(descriptors, maps, sample_interval=3, voting="relative")
        for descriptor, truth in list(zip(descriptors, objects, strict=True))[4:]:
            np.testing.assert_array_equal(foreground_patches(model, descriptor), truth)
        assert not any(foreground_patches(model, descriptor).any() for descriptor in descriptors[:4])
        assert not fit_foreground(descriptors, maps, sample_interval=3).salient.any() or shift
    flat = fit_foreground(descriptors, [np.full((12, 12), 0.3)] * 6, sample_interval=3, voting="relative")
    assert "no salient cluster" in flat.notes[0]


def test_the_elbow_uses_the_k_that_stops_it() -> None:
    descriptors, saliency, _ = scenes(5)
    model = fit_foreground(descriptors, saliency, sample_interval=3)
    assert len(model.objectives) == len(model.centroids) < 14
    gains = [after / before for before, after in pairwise(model.objectives)]
    assert gains[-1] > 0.975 and all(gain <= 0.975 for gain in gains[:-1])
    everything = np.concatenate([unit_rows(descriptor) for descriptor in descriptors]).astype(np.float64)
    distances = ((everything[:, None] - model.centroids.astype(np.float64)) ** 2).sum(axis=2)
    assert model.objectives[-1] == pytest.approx(distances.min(axis=1).mean(), rel=1e-4)


def test_the_elbow_ends_at_the_most_clusters(noise_map: NoiseMap) -> None:
    maps = [noise_map(20, 20, 32, seed) for seed in range(3)]
    found = cluster_by_elbow(sample_rows(maps, 2), maps, 1.0, FaissKMeans(), max_clusters=5)
    assert len(found.centroids) == 5 and found.note == ""


def test_one_image() -> None:
    descriptors, saliency, objects = scenes(1)
    model = fit_foreground(descriptors, saliency, sample_interval=1)
    assert model.voters == 1
    np.testing.assert_array_equal(foreground_patches(model, descriptors[0]), objects[0])


def test_fewer_descriptors_than_clusters(noise_map: NoiseMap) -> None:
    model = fit_foreground([noise_map(2, 2, 8)], [np.ones((2, 2))])
    assert len(model.centroids) == 1
    assert model.notes == (
        "only 1 descriptors to cluster",
        "every one of the 1 clusters is salient, so there is no background",
    )
    assert foreground_patches(model, noise_map(2, 2, 8)).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_descriptors_that_are_all_the_same(value: float) -> None:
    same = np.full((6, 6, 8), value, np.float32)
    model = fit_foreground([same, same], [np.ones((6, 6)), np.zeros((6, 6))], sample_interval=1)
    assert len(model.centroids) == 1 and model.votes.tolist() == [1] and not model.salient.any()
    assert model.notes[0] == "all descriptors are the same"
    assert not foreground_patches(model, same).any()


def test_few_different_descriptors() -> None:
    two = np.zeros((6, 6, 8), np.float32)
    two[:3, :, 0] = two[3:, :, 1] = 1
    model = fit_foreground([two], [two[..., 0]], sample_interval=1)
    assert model.notes == ("there are only 2 different descriptors",)
    np.testing.assert_array_equal(foreground_patches(model, two), two[..., 0] == 1)


def test_clusters_without_patches_get_no_votes() -> None:
    descriptors, saliency, objects = scenes(4)

    def with_a_stray(points: np.ndarray, k: int) -> np.ndarray:
        return np.concatenate([FaissKMeans()(points, k), -np.ones((1, 8), np.float32)])

    model = fit_foreground(descriptors, saliency, sample_interval=3, kmeans=with_a_stray)
    assert model.votes[-1] == 0 and not model.salient[-1]
    np.testing.assert_array_equal(foreground_patches(model, descriptors[0]), objects[0])


def test_no_images() -> None:
    model = fit_foreground([], [])
    assert model.notes == ("there are no patches to cluster",)
    assert not foreground_patches(model, np.ones((2, 3, 4), np.float32)).any()
    assert (assign_clusters(model, np.ones((2, 3, 4), np.float32)) == -1).all()


def test_requests_that_do_not_fit(noise_map: NoiseMap) -> None:
    one, ones = noise_map(3, 4, 8), np.ones((3, 4))
    for change, said in [
        ({"descriptors": [one, one]}, "2 descriptor maps with 1 saliency maps"),
        ({"saliency": [ones.T]}, "image 0 has 3 x 4 descriptors"),
        ({"descriptors": [one[0]]}, r"not \(4, 8\)"),
        ({"descriptors": [one, one[..., :5]], "saliency": [ones, ones]}, r"one length, not \[5, 8\]"),
        ({"descriptors": [one * np.nan]}, "not finite"),
        ({"elbow": 1.5}, "elbow"),
        ({"votes_percentage": 0}, "votes_percentage"),
        ({"sample_interval": 0}, "sample_interval"),
        ({"voting": "loud"}, "published or relative, not 'loud'"),
    ]:
        with pytest.raises(ValueError, match=said):
            fit_foreground(**({"descriptors": [one], "saliency": [ones]} | change))


def test_nearest_centroids_against_faiss_and_loops(noise_map: NoiseMap, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, centroids = unit_rows(noise_map(9, 11, 16)), unit_rows(noise_map(1, 7, 16, seed=1))
    index = faiss.IndexFlatL2(16)
    index.add(centroids)
    distances, labels = index.search(rows, 1)
    exact = ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    for block in (1_000_000, 21):  # at once, and three rows at a time
        monkeypatch.setattr("dino_ops.published_kmeans.MAX_DISTANCE_BLOCK_VALUES", block)
        ours, ours_distances = nearest_centroids(rows, centroids)
        np.testing.assert_array_equal(ours, labels[:, 0])
        np.testing.assert_allclose(ours_distances, distances[:, 0], atol=1e-5)
        np.testing.assert_allclose(squared_distances(rows, centroids), exact, atol=1e-5)


def test_mean_saliency_of_clusters() -> None:
    labels, saliency = np.array([[0, 2], [2, 0]]), np.array([[0.2, 0.5], [0.7, 0.4]])
    np.testing.assert_allclose(mean_saliency(labels, saliency, 4), [0.3, -np.inf, 0.6, -np.inf])


def test_samples_start_again_in_each_image(noise_map: NoiseMap) -> None:
    maps = [noise_map(2, 3, 4, seed=1), noise_map(1, 5, 4, seed=2)]
    kept = [np.array([[0, 1, 1], [1, 1, 1]], bool), np.array([[0, 0, 0, 1, 1]], bool)]
    expected = [maps[0][0, 0], maps[0][1, 1], maps[1][0, 0], maps[1][0, 4]]
    np.testing.assert_array_equal(sample_rows(maps, 4), [unit_rows(row)[0] for row in expected])
    expected = [maps[0][0, 1], maps[0][1, 2], maps[1][0, 3]]
    np.testing.assert_array_equal(sample_rows(maps, 4, kept), [unit_rows(row)[0] for row in expected])


def test_outliers() -> None:
    alike = np.array([[1, 0.1, 0], [1, -0.1, 0], [1, 0, 0.1], [-0.2, 1, 0], [0, 0, 0]])
    mean = alike.mean(axis=0)
    cosines = [row @ mean / (np.linalg.norm(row) * np.linalg.norm(mean) or 1) for row in alike]
    np.testing.assert_array_equal(inliers(alike, 0.7), np.array(cosines) >= 0.7)
    np.testing.assert_array_equal(inliers(alike, 0.7), [True, True, True, False, False])
    np.testing.assert_array_equal(inliers(alike[3:4], 0.7, mean=alike[:3].mean(axis=0)), [False])
    assert inliers(alike[:0]).shape == (0,)
