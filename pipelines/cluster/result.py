"""The result of a run of cluster, and what the steps of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.cluster.vectors import training_settings
from pipelines.results.cluster_models import Model
from pipelines.results.cluster_statistics import Counting, Statistics
from pipelines.running.reports import JobResult
from pipelines.settings.sections import ClusterSettings, Config
from pipelines.store.store import Store


@dataclass
class Result(JobResult):
    """What a run of cluster did, or would do.

    what: train or update. images: those of the store that have something to cluster. vectors: those assigned, all in
    all. iterations: of all levels, with those of earlier runs that this one continued. resumed_from: iterations that an
    earlier run had done. objective: mean inertia a vector at the end of the training. mean_distance: of the vectors
    that this run assigned to their centroids. largest: vectors in the largest cluster. empty: clusters without vectors.
    held_share: fraction of the vectors that workers kept in memory. pass_seconds: of one pass over the vectors to
    train on, as a median.

    Of an update: added, images; removed, images that changed or are gone; drift, mean_distance divided by that of the
    training.
    """

    name: str
    of: str
    what: str = ""
    k: int = 0
    dimension: int = 0
    images: int = 0
    vectors: int = 0
    trained_on: int = 0
    iterations: int = 0
    resumed_from: int = 0
    objective: float | None = None
    mean_distance: float | None = None
    drift: float | None = None
    added: int = 0
    removed: int = 0
    largest: int = 0
    empty: int = 0
    held_share: float = 0.0
    pass_seconds: float | None = None

    def describe(self, model: Model, statistics: Statistics) -> None:
        """Fill in what a model and the statistics of its clusters say."""
        about = model.progress
        self.k, self.dimension = model.k, model.dimension
        self.vectors, self.trained_on = int(statistics.sizes.sum()), about.trained_on
        self.iterations = len(about.objectives)
        self.objective = about.objectives[-1] if about.objectives else None
        self.largest = int(np.max(statistics.sizes, initial=0))
        self.empty = int((statistics.sizes == 0).sum())


@dataclass
class ClusterJob:
    """What the steps of a run share. images: image_id, run_id, shard. uri: of clusters/NAME."""

    store: Store
    asked: ClusterSettings
    config: Config
    images: pa.Table
    uri: str
    result: Result

    @property
    def settings(self) -> dict[str, Any]:
        return training_settings(self.store.config, self.asked)

    @property
    def has_saliency(self) -> bool:
        return self.asked.of == "patches" and self.store.config.features.saliency

    def counting(self, k: int) -> Counting:
        return Counting(k, self.asked.metric == "cosine", self.store.config.store.salient_threshold)
