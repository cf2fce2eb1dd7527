"""First centroids of k-means: k-means++, exactly, at the cost of one pass of assignment.

k-means++ (Arthur and Vassilvitskii, SODA 2007) draws every next centroid with a probability proportional to its
squared distance from those chosen before. Done literally that is a pass over the sample for every centroid. Here a
batch is drawn from the distances as they were, and each draw is kept with the probability by which its distance has
shrunk since: rejection sampling (Cohen-Addad et al., "Fast and Accurate k-means++ via Rejection Sampling", NeurIPS
2020), which gives the same distribution. Distances are then brought up to date by one product for the whole batch.

All in float64: a sample is small, and the same seed should choose the same vectors whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dino_ops.kmeans_assignment import Vectors, as_tensor, float64, unit

CANDIDATES_PER_BATCH = 128
CPU_FLOAT64_BLOCK_VALUES = 2**19
GPU_FLOAT64_BLOCK_VALUES = 2**25
# Vectors count as the same where their squared distance is at most this part of the squared lengths.
ROUNDING_PER_SQUARED_LENGTH = 1e-12


def seed(sample: Vectors, k: int, *, spherical: bool, seed: int | Sequence[int]) -> np.ndarray:
    """k vectors of a sample, by k-means++: (k', D) float64, k' < k where fewer are distinct.

    sample: (n, D) floating point on any device. Spherical: directions; zero vectors are not chosen unless there is
    nothing else, in which case the one centroid is a direction that stands for none.
    """
    if k < 1:
        raise ValueError(f"k-means needs at least one cluster, but {k} were asked for")
    drawing = _Drawing(as_tensor(sample), spherical)
    generator = np.random.default_rng(seed)
    chosen = drawing.first(generator)
    while 0 < len(chosen) < k and (batch := drawing.batch(generator, min(CANDIDATES_PER_BATCH, k - len(chosen)))):
        chosen += batch
    if not chosen and len(sample) and spherical:
        return np.full((1, sample.shape[1]), sample.shape[1] ** -0.5)
    return drawing.vectors(chosen).cpu().numpy()


def seed_within(
    sample: Vectors,
    parents: Vectors,
    ks: Sequence[int] | np.ndarray,
    *,
    spherical: bool,
    seed: int,
    parent_centroids: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """k-means++ inside every parent: centroids (k', D) float64, and offsets (parents + 1,) int64 as in Codebook.

    sample: (n, D). parents: (n,) integers, 0 to len(ks) - 1. ks: how many children each parent should get; it gets
    fewer where fewer vectors are distinct. parent_centroids: (parents, D); a parent without a vector in the sample
    gets its own centroid as its only child, or none where they are not given.
    """
    tensor = as_tensor(sample)
    held = as_tensor(parents).cpu().numpy()
    order = np.argsort(held, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(held, minlength=len(ks)))[:-1])
    children = []
    for parent, rows in enumerate(groups):
        if len(rows):
            members = tensor[torch.from_numpy(rows).to(tensor.device)]
            children.append(_seed(members, int(ks[parent]), spherical=spherical, seed=(seed, parent)))
        elif parent_centroids is not None:
            children.append(np.asarray(parent_centroids[parent : parent + 1], np.float64))
        else:
            children.append(np.zeros((0, sample.shape[1])))
    return np.concatenate(children), np.cumsum([0, *map(len, children)])


# Functions here have an argument of the same name.
_seed = seed


class _Drawing:
    """A sample, and for every vector half its squared distance from the nearest chosen one (1 - cosine)."""

    def __init__(self, sample: torch.Tensor, spherical: bool) -> None:
        if sample.ndim != 2:
            raise ValueError(f"a sample has two axes (n, D), not {sample.ndim}")
        self.sample, self.spherical = sample, spherical
        values = CPU_FLOAT64_BLOCK_VALUES if sample.device.type == "cpu" else GPU_FLOAT64_BLOCK_VALUES
        self.rows = max(1, values // max(1, sample.shape[1]))
        starts = range(0, len(sample), self.rows)
        # Moving a sample to its mean changes no distance and keeps the products' rounding small.
        self.middle = sample.new_zeros(sample.shape[1], dtype=torch.float64)
        if not spherical and len(sample):
            self.middle = sum((self._block(i).sum(dim=0) for i in starts), self.middle) / len(sample)
        squared = [self._block(i).square().sum(dim=1) for i in starts]
        self.squared = (torch.cat(squared) if squared else self.middle.new_zeros(0)).cpu().numpy()
        if not np.isfinite(self.squared).all():
            raise ValueError("vectors to cluster must be finite; some are nan or infinite")
        self.distances = np.zeros(0)

    def first(self, generator: np.random.Generator) -> list[int]:
        """A vector at random; spherical: one that has a direction."""
        eligible = np.flatnonzero(self.squared > 0) if self.spherical else np.arange(len(self.sample))
        if not len(eligible):
            return []
        chosen = generator.choice(eligible, 1)
        self.distances = np.full(len(self.sample), np.inf)
        self._bring_up_to_date(chosen)
        return chosen.tolist()

    def batch(self, generator: np.random.Generator, most: int) -> list[int]:
        """Up to `most` further ones; none when every vector has been chosen or is the same as one that was."""
        cumulated = np.cumsum(self.distances)
        if cumulated[-1] <= 0:
            return []
        drawn = np.searchsorted(cumulated, generator.random(CANDIDATES_PER_BATCH) * cumulated[-1], side="right")
        # A product may round up to the very end.
        drawn = np.minimum(drawn, np.flatnonzero(self.distances)[-1])
        keep = generator.random(CANDIDATES_PER_BATCH)
        vectors = self._centred(drawn)
        among = _less_own_length(vectors, vectors).cpu().numpy() + self.squared[drawn, None] / 2
        kept: list[int] = []
        for i, row in enumerate(drawn):
            near = among[i, kept]
            rounding = 2 * ROUNDING_PER_SQUARED_LENGTH * self.squared[row]
            now = np.min(np.where(near <= rounding, 0, near), initial=self.distances[row])
            if keep[i] * self.distances[row] < now:
                kept.append(i)
                if len(kept) == most:
                    break
        chosen = drawn[kept]
        self._bring_up_to_date(chosen)
        return chosen.tolist()

    def vectors(self, rows: list[int]) -> torch.Tensor:
        """Some vectors (n, D) float64, of unit length when spherical."""
        return self._centred(np.array(rows, np.int64)) + self.middle

    def _centred(self, rows: np.ndarray) -> torch.Tensor:
        return self._converted(self.sample[torch.from_numpy(rows).to(self.sample.device)])

    def _bring_up_to_date(self, chosen: np.ndarray) -> None:
        vectors = self._centred(chosen)
        for start in range(0, len(self.sample), self.rows):
            rows = slice(start, start + self.rows)
            nearest = _less_own_length(self._block(start), vectors).amin(dim=1).cpu().numpy()
            self.distances[rows] = np.minimum(self.distances[rows], nearest + self.squared[rows] / 2)
        # What remains between equal vectors is rounding.
        self.distances[self.distances <= 2 * ROUNDING_PER_SQUARED_LENGTH * self.squared] = 0
        self.distances[chosen] = 0
        if self.spherical:
            self.distances[self.squared == 0] = 0

    def _block(self, start: int) -> torch.Tensor:
        return self._converted(self.sample[start : start + self.rows])

    def _converted(self, block: torch.Tensor) -> torch.Tensor:
        return unit(float64(block)) if self.spherical else float64(block) - self.middle


def _less_own_length(block: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Half the squared distances of a block (n, D) from vectors (m, D), without half the block's squared lengths."""
    return torch.addmm(vectors.square().sum(dim=1) / 2, block, vectors.T, alpha=-1)
