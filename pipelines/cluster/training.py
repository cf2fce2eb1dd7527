"""Distributed k-means: workers keep the vectors, the driver the centroids; only sums travel.

    k-means++ and a few rounds on a sample -> rounds over all vectors -> (the same within each cluster, level by level)

Vectors of a level below are compared only with the centroids that divide their cluster, so that a tree of 100,000
clusters costs a pass what 2 x 316 do. Sums are float64 and near ties are decided exactly (dino_ops.kmeans), so the
result does not depend on how vectors are spread over workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dino_ops.kmeans import PartialSums, assign_and_sum, choose_k, seed, seed_within, update
from pipelines.cluster.worker import WrittenFile, codebooks_of, descend
from pipelines.errors import JobError, counted
from pipelines.results.cluster_models import Level, Model
from pipelines.running.interrupts import uninterrupted
from pipelines.settings.sections import ClusterSettings

# Tasks first add up the sums of more workers.
MOST_SUMS_ADDED_BY_DRIVER = 8
SAMPLE_VECTORS_PER_CLUSTER = 64
LEAST_SAMPLE_VECTORS = 20_000
MOST_SAMPLE_BYTES = 2**30
# They cost little and save passes over everything.
ITERATIONS_ON_SAMPLE = 10
# Few clusters are easily caught in a bad start, so the best of several is taken.
STARTS_OF_FEW_CLUSTERS, FEW_CLUSTERS = 5, 256
ELBOW_SAMPLE_VECTORS = 20_000


class Workers:
    """The actors of a job and what is asked of all of them. pass_seconds: of each pass over all vectors."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self.pass_seconds: list[float] = []

    def count(self) -> tuple[int, int, int]:
        """(vectors, those to train on, dimension)."""
        counts = self._ask("count")
        return sum(c[0] for c in counts), sum(c[1] for c in counts), max((c[2] for c in counts), default=0)

    def held_share(self) -> float:
        """Fraction of the vectors that are kept in memory."""
        held = self._ask("held")
        return sum(kept for kept, _ in held) / max(sum(every for _, every in held), 1)

    def sample(self, share: float) -> np.ndarray:
        """About `share` of the vectors to train on: (n, D) float32."""
        found = [part for part in self._ask("sample", share) if len(part)]
        return np.concatenate(found).astype(np.float32) if found else np.zeros((0, 0), np.float32)

    def sums(self, levels: Sequence[Level], share: float) -> PartialSums:
        """One pass over the vectors to train on."""
        return self._add(self._start("sums", list(levels), share))

    def write(self, levels: Sequence[Level], table: str, run_id: str) -> list[WrittenFile]:
        """Files of assignments of all vectors."""
        return [file for files in self._ask("write", list(levels), table, run_id) for file in files]

    def _ask(self, method: str, *args: Any) -> list[Any]:
        import ray

        return ray.get(self._start(method, *args))

    def _start(self, method: str, *args: Any) -> list[Any]:
        import ray

        shared = [ray.put(arg) for arg in args]
        return [getattr(actor, method).remote(*shared) for actor in self._actors]

    def _add(self, sums: list[Any]) -> PartialSums:
        import ray

        add = ray.remote(_add).options(num_cpus=0)
        while len(sums) > MOST_SUMS_ADDED_BY_DRIVER:
            groups = [
                sums[at : at + MOST_SUMS_ADDED_BY_DRIVER] for at in range(0, len(sums), MOST_SUMS_ADDED_BY_DRIVER)
            ]
            sums = [add.remote(*group) for group in groups]
        return _add(*ray.get(sums))


def _add(*sums: PartialSums) -> PartialSums:
    total = sums[0]
    for one in sums[1:]:
        total = total + one
    return total


def train(
    model: Model,
    asked: ClusterSettings,
    workers: Workers,
    save: Callable[[Model], None],
    progress: Callable[[str], None],
) -> Model:
    """Train `model` from where it is to its end, in place.

    model: without levels when it is new. save: called with what is worth keeping, after every iteration. progress:
    called with a line about each.

    Raises JobError when there is nothing to train on.
    """
    about, spherical = model.progress, asked.metric == "cosine"
    if about.trained:
        return model
    about.vectors, about.trained_on, dimension = workers.count()
    if not about.trained_on:
        raise JobError("There is nothing to train on: " + _why_nothing(asked, about.vectors))
    share = 1.0
    if asked.sample is not None and asked.sample < about.trained_on:
        share = asked.sample / about.trained_on
        about.trained_on = asked.sample
    if len(model.levels) < asked.levels:
        sample = _sample(workers, asked.k, share, about.trained_on, dimension)
        about.ks = about.ks or ([_elbow(sample, asked, model)] if asked.elbow is not None else _level_sizes(asked))
    for number in range(about.level, len(about.ks)):
        about.level = number
        if len(model.levels) <= number:
            model.levels.append(_start(sample, model.levels, about.ks[number], asked))
            about.iteration, about.converged = 0, False
            save(model)
        while about.iteration < asked.iterations and not about.converged:
            started = time.monotonic()
            level = model.levels[number]
            total = workers.sums(model.levels, share)
            moved = update(
                level.centroids,
                total,
                spherical=spherical,
                seed=asked.seed,
                iteration=about.iteration,
                offsets=level.offsets,
            )
            objective = float(total.inertia.sum() / max(total.sizes.sum(), 1))
            gained = about.objectives[-1] - objective if about.iteration else np.inf
            with uninterrupted():
                model.levels[number] = Level(moved.centroids, level.offsets)
                about.converged = not moved.reseeded and gained <= asked.tolerance * objective
                about.objectives.append(objective)
                about.iteration += 1
            took = time.monotonic() - started
            workers.pass_seconds.append(took)
            save(model)
            of_level = f"level {number + 1} of {asked.levels}, " if asked.levels > 1 else ""
            progress(
                f"{of_level}iteration {about.iteration} of at most {asked.iterations}, mean "
                f"{'distance' if spherical else 'squared distance'} {objective:.6g}, {took:.1f} s"
            )
    if model.k < about.ks[-1]:
        why = (
            "there are no more distinct vectors"
            if asked.levels == 1
            else "some branches have too few vectors to divide"
        )
        were, made = "was" if about.ks[-1] == 1 else "were", "was" if model.k == 1 else "were"
        message = f"{counted(about.ks[-1], 'cluster')} {were} asked for, and {model.k:,} {made} made: {why}."
        about.messages = [*dict.fromkeys([*about.messages, message])]
    about.trained = True
    return model


def _why_nothing(asked: ClusterSettings, vectors: int) -> str:
    if asked.salient_only and vectors:
        return f"none of {counted(vectors, 'patch', 'patches')} is more salient than store.salient_threshold."
    return "no vector was found; `dinoray verify` says whether the store is sound."


def _level_sizes(asked: ClusterSettings) -> list[int]:
    """k of each level: every cluster is divided into about the same number."""
    branching = asked.k ** (1 / asked.levels)
    sizes = [max(1, round(branching**level)) for level in range(1, asked.levels)]
    return [*sizes, asked.k]


def _sample(workers: Workers, k: int, share: float, trained_on: int, dimension: int) -> np.ndarray:
    """Vectors that the first centroids are chosen from: (n, D) float32."""
    wanted = max(LEAST_SAMPLE_VECTORS, SAMPLE_VECTORS_PER_CLUSTER * k)
    wanted = min(wanted, max(MOST_SAMPLE_BYTES // (4 * max(dimension, 1)), 2 * k))
    return workers.sample(share * min(1.0, wanted / trained_on))


def _elbow(sample: np.ndarray, asked: ClusterSettings, model: Model) -> int:
    assert asked.elbow is not None
    chosen = sample[np.linspace(0, len(sample) - 1, min(len(sample), ELBOW_SAMPLE_VECTORS)).astype(np.int64)]
    k, objectives = choose_k(
        torch.from_numpy(chosen),
        elbow=asked.elbow,
        most=min(asked.k, len(chosen)),
        spherical=asked.metric == "cosine",
        seed=asked.seed,
    )
    met = k > 1 and objectives[k - 1] > asked.elbow * objectives[k - 2]
    model.progress.messages.append(
        f"k = {k}: the first at which the mean squared distance is above {asked.elbow:g} of the one before."
        if met
        else f"k = {k}, the most there can be: no smaller one met the elbow {asked.elbow:g}."
    )
    return k


def _start(sample: np.ndarray, above: list[Level], k: int, asked: ClusterSettings) -> Level:
    """First centroids of a level: k-means++ on the sample, then a few rounds on it."""
    spherical = asked.metric == "cosine"
    vectors = torch.from_numpy(sample)
    if above:
        parents, _ = descend(vectors, codebooks_of(above, spherical))
        counts = np.bincount(parents.numpy(), minlength=len(above[-1].centroids))
        centroids, offsets = seed_within(
            vectors,
            parents,
            _share_out(k, counts),
            spherical=spherical,
            seed=asked.seed,
            parent_centroids=above[-1].centroids,
        )
        return Level(_on_sample(vectors, centroids, asked, parents, offsets)[0], offsets)
    starts = STARTS_OF_FEW_CLUSTERS if k <= FEW_CLUSTERS else 1
    runs = []
    for start in range(starts):
        centroids = seed(vectors, k, spherical=spherical, seed=(asked.seed, start))
        runs.append(_on_sample(vectors, centroids, asked))
    return Level(min(runs, key=lambda run: run[1])[0])


def _on_sample(
    vectors: torch.Tensor,
    centroids: np.ndarray,
    asked: ClusterSettings,
    parents: torch.Tensor | None = None,
    offsets: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """A few rounds of k-means on the sample: centroids, and the inertia of the last round."""
    spherical, inertia = asked.metric == "cosine", np.inf
    for iteration in range(ITERATIONS_ON_SAMPLE):
        total = assign_and_sum(vectors, centroids, spherical=spherical, parents=parents, offsets=offsets)
        inertia = float(total.inertia.sum())
        centroids = update(
            centroids, total, spherical=spherical, seed=asked.seed, iteration=iteration, offsets=offsets
        ).centroids
    return centroids, inertia


def _share_out(k: int, counts: np.ndarray) -> np.ndarray:
    """How many of k clusters divide each cluster of the level above: in proportion to its vectors, at least one.

    counts: (parents,) vectors of the sample in each. The largest remainders get what is left over.
    """
    parents = len(counts)
    left = max(k - parents, 0)
    exact = left * counts / max(counts.sum(), 1)
    shares = np.floor(exact).astype(np.int64)
    for at in np.argsort(shares - exact, kind="stable")[: left - int(shares.sum())]:
        shares[at] += 1
    return 1 + shares
