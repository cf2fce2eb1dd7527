"""Correspondences against the published code's points, and against loops in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans

from dino_ops import Extractor, log_bin
from dino_ops import correspondences as module
from dino_ops.correspondences import (
    NearestNeighbours,
    find_correspondences,
    in_foreground,
    nearest_neighbours,
    paired_descriptors,
    projected_descriptors,
    spread_out,
)
from dino_ops.descriptors import binned_similarity, log_bin_at

NoiseMap = Callable[..., np.ndarray]


def cosines(map_a: np.ndarray, map_b: np.ndarray, binned: bool) -> np.ndarray:
    """All similarities in float64, the long way."""
    flat = []
    for feature_map in (map_a, map_b):
        wide = log_bin(feature_map.astype(np.float64)) if binned else feature_map.astype(np.float64)
        rows = wide.reshape(-1, wide.shape[-1])
        flat.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return flat[0] @ flat[1].T


@pytest.mark.parametrize("binned", [True, False])
@pytest.mark.parametrize("shapes", [((7, 9), (5, 4)), ((12, 20), (9, 9)), ((1, 1), (3, 2)), ((1, 1), (1, 1))])
def test_neighbours_both_ways(noise_map: NoiseMap, shapes: tuple, binned: bool) -> None:
    a, b = noise_map(*shapes[0], 16, seed=1), noise_map(*shapes[1], 16, seed=2)
    similarity = cosines(a, b, binned)
    found = nearest_neighbours(a, b, binned=binned)
    np.testing.assert_array_equal(found.b_of_a, similarity.argmax(axis=1))
    np.testing.assert_array_equal(found.a_of_b, similarity.argmax(axis=0))
    np.testing.assert_allclose(found.similarity_a, similarity.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(found.similarity_b, similarity.max(axis=0), atol=1e-5)
    mutual = [i for i, j in enumerate(similarity.argmax(axis=1)) if similarity[:, j].argmax() == i]
    np.testing.assert_array_equal(found.mutual(), mutual)


@pytest.mark.parametrize("binned", [True, False])
def test_blocks_change_nothing(noise_map: NoiseMap, monkeypatch: pytest.MonkeyPatch, binned: bool) -> None:
    """Equal cells in different blocks, of either map: the first is taken, as without blocks."""
    a, b = noise_map(24, 6, 8, seed=3), noise_map(22, 5, 8, seed=4)
    a[13:], b[11:] = a[:11], b[:11]
    whole = nearest_neighbours(a, b, binned=binned)
    monkeypatch.setattr(module, "MAX_SIMILARITY_BLOCK_VALUES", 25)
    tiles = module.binned_similarity_tiles
    monkeypatch.setattr(module, "binned_similarity_tiles", lambda x, y: tiles(x, y, tile_rows=(1, 2)))
    for name, array in vars(nearest_neighbours(a, b, binned=binned)).items():
        np.testing.assert_allclose(array, vars(whole)[name], atol=1e-6)


def test_binned_rows_alone(noise_map: NoiseMap) -> None:
    feature_map, cells = noise_map(6, 7, 5), np.array([0, 41, 13, 13, 6])
    np.testing.assert_array_equal(log_bin_at(feature_map, cells), log_bin(feature_map).reshape(42, -1)[cells])


def test_binned_similarity_has_the_maxima_of_the_explicit_one(noise_map: NoiseMap) -> None:
    a, b = noise_map(14, 23, 48, seed=5), noise_map(16, 11, 48, seed=6)
    ours, explicit = binned_similarity(a, b), cosines(a, b, binned=True)
    np.testing.assert_allclose(ours, explicit, atol=1e-5)
    np.testing.assert_array_equal(ours.argmax(axis=1), explicit.argmax(axis=1))


def test_foreground_rules() -> None:
    """Written out as loops; the reference's rule is the looser one."""
    generator = np.random.default_rng(0)
    similarity = generator.standard_normal((40, 50))
    neighbours = NearestNeighbours(similarity.argmax(1), similarity.max(1), similarity.argmax(0), similarity.max(0))
    a, b = generator.random(40) > 0.4, generator.random(50) > 0.4
    strict = [bool(a[i] and b[similarity[i].argmax()]) for i in range(40)]
    loose = [bool(a[i] and any(b[j] and similarity[:, j].argmax() == i for j in range(50))) for i in range(40)]
    np.testing.assert_array_equal(in_foreground(neighbours, a, b, "strict"), strict)
    np.testing.assert_array_equal(in_foreground(neighbours, a, b, "reference"), loose)
    mutual = neighbours.mutual()
    assert np.sum(np.array(strict)[mutual]) < np.sum(np.array(loose)[mutual])


def test_fewer_dimensions_leave_k_means_as_it_was(noise_map: NoiseMap) -> None:
    points = noise_map(1, 60, 500)[0]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    saliency = np.random.default_rng(1).random(60).astype(np.float32)
    labels = KMeans(10, n_init=10, random_state=0).fit_predict(points)
    expected = {max(np.flatnonzero(labels == label), key=lambda i: saliency[i]) for label in range(10)}
    rows = spread_out(points, saliency, 10)
    assert set(rows) == expected
    assert list(saliency[rows]) == sorted(saliency[rows], reverse=True)


def test_few_points() -> None:
    points, saliency = np.eye(3, dtype=np.float32), np.array([0.2, 0.9, 0.2], np.float32)
    np.testing.assert_array_equal(spread_out(points, saliency, 10), [1, 0, 2])
    assert spread_out(points[:0], saliency[:0], 10).shape == (0,)
    with np.errstate(all="raise"):
        same = np.ones((4, 2), np.float32) / np.float32(np.sqrt(2))
        assert len(spread_out(same, np.zeros(4, np.float32), 3)) == 1


def test_no_foreground_is_an_empty_result(noise_map: NoiseMap) -> None:
    a, b = noise_map(3, 4, 8, seed=1), noise_map(4, 3, 8, seed=2)
    found = find_correspondences(a, b, np.zeros((3, 4)), np.zeros((4, 3)))
    assert len(found) == 0 and found.selected.shape == (0,) and found.similarity.dtype == np.float32


@pytest.mark.parametrize("binned", [True, False])
@pytest.mark.parametrize("tensors", [True, False])
def test_maps_without_cells_are_an_empty_result(noise_map: NoiseMap, binned: bool, tensors: bool) -> None:
    full, empty = noise_map(3, 4, 8), np.zeros((0, 4, 8), np.float32)
    for a, b in ((full, empty), (empty, full), (empty, empty)):
        maps = [torch.from_numpy(one) for one in (a, b)] if tensors else [a, b]
        found = find_correspondences(*maps, np.ones(a.shape[:2]), np.ones(b.shape[:2]), binned=binned)
        assert (len(found), found.mutual, len(found.selected)) == (0, 0, 0)
    with pytest.raises(ValueError, match="at least one cell; the maps are 0 x 4 x 8 and 3 x 4 x 8"):
        nearest_neighbours(empty, full, binned=binned)


@pytest.mark.parametrize("binned", [True, False])
def test_one_cell_each(noise_map: NoiseMap, binned: bool) -> None:
    a, b = noise_map(1, 1, 8, seed=1), noise_map(1, 1, 8, seed=2)
    found = find_correspondences(a, b, np.ones((1, 1)), np.ones((1, 1)), binned=binned)
    assert (found.cell_a.tolist(), found.cell_b.tolist(), found.selected.tolist()) == ([0], [0], [0])
    expected = a[0, 0] @ b[0, 0] / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found.similarity, [expected], atol=1e-6)


@pytest.mark.parametrize("binned", [True, False])
def test_zeros_are_like_nothing(binned: bool) -> None:
    """No division by zero; among equals the first cells find each other."""
    zeros = np.zeros((3, 4, 8), np.float32)
    found = find_correspondences(zeros, zeros, np.ones((3, 4)), np.ones((3, 4)), binned=binned)
    assert (found.cell_a.tolist(), found.cell_b.tolist(), found.similarity.tolist()) == ([0], [0], [0.0])


@pytest.mark.parametrize("binned", [True, False])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_as_zero(noise_map: NoiseMap, binned: bool, broken: float) -> None:
    a, b = noise_map(5, 6, 8, seed=1), noise_map(6, 5, 8, seed=2)
    a[2, 3, 4:], b[1, 1] = 0, 0
    saliency = np.ones((5, 6)), np.ones((6, 5))
    expected = find_correspondences(a, b, *saliency, binned=binned)
    a[2, 3, 4:], b[1, 1] = broken, broken
    for name, value in vars(find_correspondences(a, b, *saliency, binned=binned)).items():
        np.testing.assert_array_equal(value, vars(expected)[name])
    assert a[2, 3, 4] != 0, "the caller's map is not changed"


def test_maps_that_do_not_fit_are_refused(noise_map: NoiseMap) -> None:
    a, b, saliency = noise_map(3, 4, 8), noise_map(3, 4, 6), np.ones((3, 4))
    with pytest.raises(ValueError, match="3 x 4 x 8 and 3 x 4 x 6"):
        find_correspondences(a, b, saliency, saliency)
    with pytest.raises(ValueError, match="12 x 8 and 3 x 4 x 8"):
        find_correspondences(a.reshape(12, 8), a, saliency, saliency)
    with pytest.raises(ValueError, match=r"Saliency is \(4, 3\) for a map of 3 x 4 x 8"):
        find_correspondences(a, a, saliency, saliency.T)


@pytest.mark.parametrize("binned", [True, False])
def test_maps_of_other_types_and_read_only_ones(noise_map: NoiseMap, binned: bool) -> None:
    """Arrow's columns are read-only, of which torch warns, and warnings fail tests."""
    a, b = noise_map(4, 5, 8, seed=1).astype(np.float16), noise_map(5, 4, 8, seed=2).astype(np.float16)
    expected = nearest_neighbours(a.astype(np.float32), b.astype(np.float32), binned=binned)
    a.flags.writeable = b.flags.writeable = False
    for pair in ((a, b), (a.astype(np.float64), b), (a, b.astype(np.float64))):
        found = find_correspondences(*pair, np.ones((4, 5)), np.ones((5, 4)), binned=binned)
        np.testing.assert_array_equal(found.cell_a, expected.mutual())


@pytest.mark.parametrize("binned", [True, False])
def test_many_matches_are_clustered_by_a_projection(
    noise_map: NoiseMap, monkeypatch: pytest.MonkeyPatch, binned: bool
) -> None:
    """Distances stay within some per cent, so that groups which are apart stay groups."""
    a, cells = noise_map(1, 120, 64, seed=1), np.arange(120)
    b = noise_map(1, 120, 64, seed=2)
    exact = paired_descriptors(a, b, cells, cells[::-1], binned=binned)
    projected = projected_descriptors(a, b, cells, cells[::-1], binned=binned)
    assert projected.shape == (120, module.PROJECTED_DIMENSIONS)
    ratio = pdist(projected.astype(np.float64)) / pdist(exact.astype(np.float64))
    assert abs(ratio.mean() - 1) < 0.02 and ratio.std() < 0.05
    groups = np.repeat(np.arange(4), 30)
    grouped = (noise_map(1, 4, 64, seed=3)[:, groups] + 0.1 * noise_map(1, 120, 64, seed=4)).astype(np.float32)
    monkeypatch.setattr(module, "MAX_CLUSTERED_VALUES", 0)
    ones = np.ones((1, 120), np.float32)
    found = find_correspondences(grouped, grouped, ones, ones, num_pairs=4, binned=False)
    assert sorted(groups[found.cell_a[found.selected]]) == [0, 1, 2, 3]


@pytest.mark.slow
def test_memory_stays_bounded_at_large_grids() -> None:
    """128 x 128 patches with 384 dimensions, all of which match: the maps are 25 MB each, a similarity matrix 1 GB."""
    program = """
import resource, numpy as np
from dino_ops.correspondences import find_correspondences
generator = np.random.default_rng(0)
a = generator.standard_normal((128, 128, 384), dtype=np.float32)
b = a + 0.5 * generator.standard_normal((128, 128, 384), dtype=np.float32)
ones = np.ones((128, 128), np.float32)
find_correspondences(a[:4, :4], b[:4, :4], ones[:4, :4], ones[:4, :4])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = find_correspondences(a, b, ones, ones)
assert len(found) > 16_000 and len(found.selected) == 10
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1_000, "MB"


def test_an_image_matches_itself(noise_map: NoiseMap) -> None:
    a = noise_map(5, 6, 8)
    found = find_correspondences(a, a, np.ones((5, 6)), np.ones((5, 6)), num_pairs=4)
    np.testing.assert_array_equal(found.cell_a, np.arange(30))
    np.testing.assert_array_equal(found.cell_b, np.arange(30))
    np.testing.assert_allclose(found.similarity, 1, atol=1e-6)
    assert len(found.selected) == 4


def test_points_are_clustered_by_both_descriptors(noise_map: NoiseMap) -> None:
    a, b = noise_map(3, 4, 8, seed=1), noise_map(4, 3, 8, seed=2)
    cells_a, cells_b = np.array([0, 5]), np.array([11, 2])
    joined = paired_descriptors(a, b, cells_a, cells_b, binned=False)
    expected = np.concatenate([a.reshape(12, 8)[cells_a], b.reshape(12, 8)[cells_b]], axis=1)
    np.testing.assert_allclose(joined, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("number", range(4))
def test_the_published_codes_points(data_dir: Path, number: int) -> None:
    """Points (y, x) in the resized image; the published code lists them by cluster, we by saliency."""
    pair = json.loads((data_dir / "golden" / "correspondences.json").read_text())[number]
    settings = pair["settings"]
    extractor = Extractor(
        "deit_tiny_patch16_224",
        data_dir / "weights" / "deit_tiny_patch16_224_state_dict.pth",
        layer=settings["layer"],
        stride=settings["stride"],
        shorter_side=settings["load_size"],
        device="cpu",
    )
    a, b = extractor([data_dir / pair["image_a"], data_dir / pair["image_b"]])
    found = find_correspondences(
        a.descriptor, b.descriptor, a.saliency, b.saliency,
        num_pairs=settings["num_pairs"], saliency_threshold=settings["thresh"], binned=settings["bin"],
    )  # fmt: skip
    points = []
    for features, cells in ((a, found.cell_a), (b, found.cell_b)):
        row, column = np.divmod(cells[found.selected], features.y.shape[1])
        points.append(np.stack([row, column], axis=1) * settings["stride"] + extractor.patch_size // 2)
    ours = {tuple(map(float, point)) for point in np.concatenate(points, axis=1)}
    published = {(*y, *x) for y, x in zip(pair["points_a_yx"], pair["points_b_yx"], strict=True)}
    assert len(ours & published) >= 0.9 * len(published)
    for point in ours - published:  # the rest within one patch
        assert min(np.abs(np.subtract(point, other)).max() for other in published) <= settings["stride"]
