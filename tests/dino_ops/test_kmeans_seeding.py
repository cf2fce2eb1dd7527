"""k-means++: its distribution by enumeration, and what it chooses from."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from dino_ops.kmeans import assign, seed, seed_within

METRICS = pytest.mark.parametrize("spherical", [True, False], ids=["spherical", "euclidean"])


def points(vectors: np.ndarray, spherical: bool) -> np.ndarray:
    wide = np.asarray(vectors, np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True) if spherical else wide


def probability(held: np.ndarray, order: tuple[int, ...]) -> float:
    """Of choosing vectors in this order: each in proportion to its squared distance from the nearest before."""
    chance = 1 / len(held)
    for count in range(1, len(order)):
        squared = ((held[:, None] - held[list(order[:count])]) ** 2).sum(axis=2).min(axis=1)
        chance *= squared[order[count]] / squared.sum()
    return chance


@METRICS
def test_draws_are_those_of_k_means_plus_plus(spherical: bool) -> None:
    """Three of six in one batch, so that rejection matters: each set as often as enumeration says."""
    sample = np.random.default_rng(3).standard_normal((6, 2)).astype(np.float32) * np.arange(1, 7)[:, None]
    held, runs = points(sample, spherical), 800
    seen: Counter[tuple[int, ...]] = Counter()
    for run in range(runs):
        chosen = seed(sample, 3, spherical=spherical, seed=run)
        seen[tuple(sorted(int(np.abs(held - c).sum(axis=1).argmin()) for c in chosen))] += 1
    for members in itertools.combinations(range(6), 3):
        chance = sum(probability(held, order) for order in itertools.permutations(members))
        deviation = np.sqrt(runs * chance * (1 - chance))
        assert abs(seen[members] - runs * chance) < 4.5 * deviation + 1, members


@METRICS
@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
def test_seeds_are_distinct_vectors_of_the_sample(spherical: bool, kind: torch.dtype) -> None:
    sample = torch.from_numpy(np.random.default_rng(0).standard_normal((900, 12))).to(kind)
    chosen = seed(sample, 300, spherical=spherical, seed=4)
    held = points(sample.double().numpy(), spherical)
    away = np.abs(chosen[:, None] - held).sum(axis=2)
    assert away.min(axis=1).max() < 1e-9
    assert len(set(away.argmin(axis=1))) == 300
    np.testing.assert_array_equal(chosen, seed(sample, 300, spherical=spherical, seed=4))
    assert not np.array_equal(chosen, seed(sample, 300, spherical=spherical, seed=5))


@METRICS
def test_seeds_cover_separate_groups(spherical: bool) -> None:
    """One seed for each of 60 groups, where vectors at random would miss a third."""
    generator = np.random.default_rng(0)
    centres = 10 * generator.standard_normal((60, 40))
    sample = (np.repeat(centres, 30, axis=0) + 0.01 * generator.standard_normal((1_800, 40))).astype(np.float32)
    chosen = seed(sample, 60, spherical=spherical, seed=1)
    groups, _ = assign(chosen.astype(np.float32), points(centres, spherical), spherical=spherical)
    assert len(set(groups.tolist())) == 60


@METRICS
def test_fewer_where_fewer_are_distinct(spherical: bool) -> None:
    distinct = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float16)
    sample = np.repeat(distinct, 50, axis=0)
    chosen = seed(sample, 20, spherical=spherical, seed=0)
    np.testing.assert_allclose(np.sort(chosen, axis=0), np.sort(points(distinct, spherical), axis=0), atol=1e-12)
    shifted = seed(sample.astype(np.float32) + 1000, 20, spherical=False, seed=0)
    assert len(shifted) == 7


def test_zero_vectors_have_no_direction() -> None:
    sample = np.concatenate([np.zeros((50, 3)), np.eye(3)]).astype(np.float32)
    chosen = seed(sample, 10, spherical=True, seed=0)
    np.testing.assert_allclose(np.sort(chosen, axis=0), np.sort(np.eye(3), axis=0))
    alone = seed(sample[:50], 10, spherical=True, seed=0)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), [1])
    assert len(seed(sample, 10, spherical=False, seed=0)) == 4
    assert seed(sample[:0], 10, spherical=True, seed=0).shape == (0, 3)


def test_within_parents() -> None:
    sample = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    parents = np.random.default_rng(1).choice([0, 1, 3], 200)
    own = np.arange(16.0).reshape(4, 4)
    centroids, offsets = seed_within(sample, parents, [3, 500, 2, 4], spherical=False, seed=0, parent_centroids=own)
    counts = [3, (parents == 1).sum(), 1, 4]
    np.testing.assert_array_equal(offsets, np.cumsum([0, *counts]))
    np.testing.assert_array_equal(centroids[offsets[2]], own[2])
    for parent in (0, 1, 3):
        for centroid in centroids[offsets[parent] : offsets[parent + 1]]:
            assert np.abs(sample[parents == parent] - centroid).sum(axis=1).min() < 1e-6
    _, without = seed_within(sample, torch.from_numpy(parents), [3, 5, 2, 4], spherical=False, seed=0)
    np.testing.assert_array_equal(without, [0, 3, 8, 8, 12])


def test_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        seed(np.array([[1.0, np.inf]], np.float32), 1, spherical=False, seed=0)
