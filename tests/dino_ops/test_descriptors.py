"""Log-binning and binned similarity against loops over cells, and channel orders."""

from __future__ import annotations

import resource
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dino_ops.descriptors import (
    binned_similarity,
    binned_similarity_at,
    binned_similarity_blocks,
    log_bin,
    order_channels,
)

NoiseMap = Callable[..., np.ndarray]


def log_bin_by_loops(feature_map: np.ndarray, hierarchy: int) -> np.ndarray:
    """One cell, one bin, one neighbour at a time, in float64."""
    feature_map = feature_map.astype(np.float64)
    height, width, _ = feature_map.shape
    averages = []
    for level in range(hierarchy):
        reach = 3**level // 2
        average = np.empty_like(feature_map)
        for y in range(height):
            for x in range(width):
                window = feature_map[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
                average[y, x] = window.mean(axis=(0, 1))
        averages.append(average)
    rows = []
    for y in range(height):
        for x in range(width):
            bins = []
            for level in range(hierarchy):
                for dy in (-(3**level), 0, 3**level):
                    for dx in (-(3**level), 0, 3**level):
                        if level > 0 and dy == dx == 0:
                            continue
                        near_y, near_x = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
                        bins.append(averages[level][near_y, near_x])
            rows.append(np.concatenate(bins))
    return np.array(rows).reshape(height, width, -1)


SHAPES = [(7, 9), (5, 4), (1, 1), (1, 6), (2, 3), (12, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hierarchy", [1, 2, 3])
def test_log_bin_equals_loops(noise_map: NoiseMap, shape: tuple[int, int], hierarchy: int) -> None:
    feature_map = noise_map(*shape, 5)
    binned = log_bin(feature_map, hierarchy)
    assert binned.shape == (*shape, (1 + 8 * hierarchy) * 5)
    np.testing.assert_allclose(binned, log_bin_by_loops(feature_map, hierarchy), atol=1e-5)


def test_log_bin_of_a_batch_and_of_tensors(noise_map: NoiseMap) -> None:
    maps = np.stack([noise_map(6, 5, 4, seed) for seed in range(3)])
    batch = log_bin(torch.from_numpy(maps))
    assert isinstance(batch, torch.Tensor)
    for i in range(3):
        np.testing.assert_array_equal(batch[i], log_bin(maps[i]))
    assert log_bin(maps.astype(np.float16)).dtype == np.float32
    assert log_bin(maps.astype(np.float64)).dtype == np.float64


@pytest.mark.parametrize("shape_a", SHAPES)
@pytest.mark.parametrize("shape_b", [(5, 8), (1, 2)])
@pytest.mark.parametrize("hierarchy", [1, 2, 3])
def test_binned_similarity_equals_binning_first(
    noise_map: NoiseMap, shape_a: tuple[int, int], shape_b: tuple[int, int], hierarchy: int
) -> None:
    a, b = noise_map(*shape_a, 6, 1).astype(np.float64), noise_map(*shape_b, 6, 2).astype(np.float64)
    rows_a = log_bin_by_loops(a, hierarchy).reshape(shape_a[0] * shape_a[1], -1)
    rows_b = log_bin_by_loops(b, hierarchy).reshape(shape_b[0] * shape_b[1], -1)
    expected = rows_a @ rows_b.T / np.outer(np.linalg.norm(rows_a, axis=1), np.linalg.norm(rows_b, axis=1))
    for block_rows in (None, 1, 3):
        similarity = binned_similarity(a, b, hierarchy, block_rows)
        np.testing.assert_allclose(similarity, expected, atol=1e-12)


def test_binned_similarity_blocks_cover_map_a(noise_map: NoiseMap) -> None:
    a, b = noise_map(7, 5, 4, 1), noise_map(6, 3, 4, 2)
    whole = binned_similarity(a, b)
    assert whole.dtype == np.float32
    firsts = []
    for first, block in binned_similarity_blocks(a, b, block_rows=3):
        firsts.append(first)
        np.testing.assert_allclose(block, whole[first : first + len(block)], atol=1e-6)
    assert firsts == [0, 15, 30]
    torch.testing.assert_close(
        binned_similarity(torch.from_numpy(a), torch.from_numpy(b)), torch.from_numpy(whole), rtol=0, atol=0
    )


def test_zero_descriptors_have_similarity_zero(noise_map: NoiseMap) -> None:
    assert (binned_similarity(np.zeros((4, 4, 3), np.float32), noise_map(4, 4, 3)) == 0).all()


def test_binned_similarity_needs_no_binned_maps(noise_map: NoiseMap) -> None:
    """Binning these maps would take 2 x 104 MB; blocks of the result need a fraction."""
    a, b = noise_map(63, 63, 384, 1), noise_map(63, 63, 384, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = [block.argmax(axis=1) for _, block in binned_similarity_blocks(a, b, block_rows=8)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(np.concatenate(best)) == 63 * 63
    assert grown < 150_000  # KiB


def test_channel_orders() -> None:
    heads, dims = 3, 4
    head_major = torch.arange(heads * dims)
    dim_major = order_channels(head_major, heads, "dim_major")
    for head in range(heads):
        for dim in range(dims):
            assert dim_major[dim * heads + head] == head_major[head * dims + dim]
    assert order_channels(head_major, heads, "head_major") is head_major


@pytest.mark.parametrize("hierarchy", [1, 2, 3])
@pytest.mark.parametrize("shapes", [((7, 9), (5, 4)), ((1, 1), (3, 2)), ((4, 3), (1, 1))])
def test_similarity_at_some_cells(noise_map: NoiseMap, shapes: tuple, hierarchy: int) -> None:
    a, b = noise_map(*shapes[0], 16, seed=1), noise_map(*shapes[1], 16, seed=2)
    cells = np.random.default_rng(0).integers(0, a.shape[0] * a.shape[1], 6)
    left, right = (log_bin_by_loops(one, hierarchy).reshape(-1, (1 + 8 * hierarchy) * 16) for one in (a, b))
    left, right = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (left, right))
    np.testing.assert_allclose(binned_similarity_at(a, cells, b, hierarchy), left[cells] @ right.T, atol=1e-5)
