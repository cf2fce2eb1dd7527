"""cluster: patches (or images) of a store become clusters/NAME/centroids and clusters/NAME/assignments.

    what there is -> workers hold it -> k-means -> every vector assigned -> both tables replaced

With `update` the centroids stay: images that are new or changed are assigned to them, those that are gone taken out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.cluster.vectors import (
    Reading,
    check_store,
    clustered_images,
    digest,
    list_units,
    split_units,
    training_settings,
)
from pipelines.errors import RequestError
from pipelines.results.cluster_models import Model, Progress, checkpoint_uri, model_uri, write_model
from pipelines.results.cluster_statistics import Counting, Statistics
from pipelines.results.clusters import ClusterTables, checkpoint, clusters_uri
from pipelines.running.cpus import available_cpus
from pipelines.running.interrupts import interruptible, uninterrupted
from pipelines.running.layout import Layout, plan_workers
from pipelines.running.progress import StatusLine
from pipelines.running.ray_session import explain_ray_error, ray_session
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.differences import differences
from pipelines.settings.loading import make_config
from pipelines.settings.sections import ClusterSettings, Config
from pipelines.store.store import Store
from pipelines.store.table import CommitConflict

if TYPE_CHECKING:
    from pipelines.cluster.training import Workers
    from pipelines.cluster.worker import WorkerSetup


MOST_CPUS_PER_WORKER = 4.0  # matrix products of a row group use more of them badly
CACHE_SHARE = 1 / 3  # of the memory that Ray has
PUBLISHED_ELBOW = 0.975  # Amir et al. 2021, supplementary material
DRIFT = 1.1  # mean distance of new images to that of the training's above which it is said
CHECKPOINT_SHARE = 0.1  # of the time at most that writing checkpoints may take


@dataclass
class Result(JobResult):
    """What a run of cluster did, or would do."""

    name: str
    of: str
    what: str = ""  # train | update
    k: int = 0
    dimension: int = 0
    images: int = 0  # in the store that have something to cluster
    vectors: int = 0  # assigned, all in all
    trained_on: int = 0
    iterations: int = 0  # of all levels, those of earlier runs that this one continued included
    resumed_from: int = 0  # iterations that an earlier run had done
    objective: float | None = None  # mean inertia a vector at the end of the training
    mean_distance: float | None = None  # of the vectors that this run assigned
    drift: float | None = None  # update: the same in parts of that of the training
    added: int = 0  # update: images
    removed: int = 0  # update: images that changed or are gone
    largest: int = 0  # vectors in the largest cluster
    empty: int = 0  # clusters without any
    held_share: float = 0.0  # of the vectors that workers kept in memory
    pass_seconds: float | None = None  # of one pass over the vectors to train on: the median


def run(
    config: Config, *, store: str, name: str, elbow: bool = False, update: bool = False, dry_run: bool = False
) -> Result:
    """Cluster the patches or embeddings of `store`; the same command continues a training that was killed.

    Args:
        name: of the result, clusters/NAME in the store.
        elbow: choose k; as cluster.elbow says, or as published.
        update: keep the centroids there are and assign what is new; without any, train.
        dry_run: plan only; nothing is written.

    Raises:
        RequestError: the request was wrong.
        JobError: the job failed; what was there stays.
    """
    started = time.monotonic()
    if elbow and config.cluster.elbow is None:
        given = config.cluster.model_dump(include=config.cluster.model_fields_set)
        config = make_config({**config.model_dump(exclude={"cluster"}), "cluster": {**given, "elbow": PUBLISHED_ELBOW}})
    opened = Store.open(store, config)
    options = config.storage.options
    uri = clusters_uri(opened.uri, name)
    tables = ClusterTables.open_existing(opened.uri, name, options)
    model = tables.model() if tables else None
    asked = _settings(config.cluster, model, name) if update else config.cluster
    check_store(opened, asked)
    if model is not None:
        _refuse_another_kind(uri, name, model, asked)
    images = clustered_images(opened, asked)
    result = Result(new_run_id(), opened.uri, name, asked.of, images=len(images))
    if not len(images):
        raise RequestError(f"No image of the store {opened.uri} has patches to cluster.")
    result.what = "update" if update and model else "train"
    job = _Job(opened, asked, config, images, uri, result)
    if dry_run:
        _plan(job, tables, model)
        return result.ended("dry_run", started)
    if tables and model and not update and _same(job, model) and tables.centroids_agree():
        _describe(result, model, tables.stored_statistics())
        return result.ended("unchanged", started)

    report = RunReport("cluster", opened.uri, config, result.run_id, {"name": name, "update": update})
    with recorded(report, result, started, fingerprint=opened.fingerprint):
        result.seconds["plan"] = time.monotonic() - started
        if result.what == "update":
            assert tables is not None and model is not None
            _update(job, tables, model)
        else:
            _train(job, model)
    return result


@dataclass
class _Job:
    """What the steps of a run share."""

    store: Store
    asked: ClusterSettings
    config: Config
    images: pa.Table  # image_id, run_id, shard
    uri: str  # clusters/NAME
    result: Result

    @property
    def settings(self) -> dict[str, Any]:
        return training_settings(self.store.config, self.asked)

    @property
    def has_saliency(self) -> bool:
        return self.asked.of == "patches" and self.store.config.features.saliency

    def counting(self, k: int) -> Counting:
        return Counting(k, self.asked.metric == "cosine", self.store.config.store.salient_threshold)


def _settings(asked: ClusterSettings, model: Model | None, name: str) -> ClusterSettings:
    """The settings that a model was trained with, which an update keeps.

    Raises RequestError when others are asked for.
    """
    if model is None:
        return asked
    stored = model.progress.settings
    given = asked.model_dump(mode="json", include=asked.model_fields_set & stored.keys())
    differing = differences(stored, given, "cluster.{key}: trained with {before}, asked {asked}", only=given)
    if differing:
        raise RequestError(
            f"The clusters {name} were trained with other settings ({'; '.join(differing)}), and an update keeps its "
            "centroids: leave these settings out, give another NAME, or train anew without --update."
        )
    fields = {key: value for key, value in stored.items() if key in ClusterSettings.model_fields}
    return ClusterSettings.model_validate({**fields, "cache_gb": asked.cache_gb})


def _refuse_another_kind(uri: str, name: str, model: Model, asked: ClusterSettings) -> None:
    """Raises RequestError for clusters of patches where images are to be clustered, or the other way round."""
    if (before := model.progress.settings["of"]) != asked.of:
        raise RequestError(
            f"The clusters {name} are of {before}, asked was {asked.of}: give another NAME for these, or remove {uri}."
        )


def _same(job: _Job, model: Model) -> bool:
    """Whether a model is of the same settings and the same images."""
    return model.progress.settings == job.settings and model.progress.images == digest(job.images)


def _why_again(job: _Job, before: Model) -> str:
    differing = differences(before.progress.settings, job.settings, "cluster.{key} was {before}", only=job.settings)
    return f"since other settings were given ({', '.join(differing)})" if differing else "since the images have changed"


def _plan(job: _Job, tables: ClusterTables | None, model: Model | None) -> None:
    """Say what a run would do."""
    result = job.result
    if result.what == "update":
        assert tables is not None
        fresh, gone = _changes(job.images, tables.covered())
        result.added, result.removed = len(fresh), len(gone)
        return
    files = job.store.patches.files() if job.asked.of == "patches" else job.store.images.files()
    result.vectors = sum(file.rows for file in files.values())
    left = checkpoint(job.uri, job.config.storage.options)
    if left is not None and _same(job, left):
        result.resumed_from = len(left.progress.objectives)
    result.k = job.asked.k
    if model is not None and not _same(job, model):
        result.messages.append(f"The clusters {result.name} would be trained anew, {_why_again(job, model)}.")


def _train(job: _Job, before: Model | None) -> None:
    """Train, assign everything, and put the result in place of what was there."""
    result, options = job.result, job.config.storage.options
    model = checkpoint(job.uri, options)
    if before is not None and _same(job, before):
        model = before  # a run that was killed between its two commits
    if model is None or not _same(job, model):
        model = Model(Progress(result.run_id, job.settings, digest(job.images)), [])
    if before is not None and not _same(job, before):
        result.messages.append(f"The clusters {result.name} were trained anew, {_why_again(job, before)}.")
    result.resumed_from = len(model.progress.objectives)
    if result.resumed_from and not model.progress.trained:
        result.messages.append(f"Continued after iteration {result.resumed_from} of an earlier run.")
    from pipelines.cluster.training import train

    checkpoints = _Checkpoints(job.uri, options)
    with _workers(job, job.images) as (workers, line):
        began = time.monotonic()
        try:
            train(model, job.asked, workers, checkpoints.save, line.show)
        except KeyboardInterrupt:
            checkpoints.finish()
            raise
        write_model(checkpoint_uri(job.uri), model, options)
        result.seconds["train"] = time.monotonic() - began
        result.pass_seconds = float(np.median(workers.pass_seconds)) if workers.pass_seconds else None
        result.messages += model.progress.messages
        line.show("assigning")
        written = _assign(job, workers, model)
    total = sum((file.statistics for file in written), Statistics.zeros(model.k))
    model.progress.mean_distance = result.mean_distance
    began = time.monotonic()
    with uninterrupted():
        write_model(model_uri(job.uri, model.progress.run_id), model, options)
        tables = ClusterTables(job.store.uri, result.name, options)
        tables.replace(model, [file.file for file in written], total, job.has_saliency)
        tables.remove_leftovers()
    result.seconds["commit"] = time.monotonic() - began
    _describe(result, model, total)


def _update(job: _Job, tables: ClusterTables, model: Model) -> None:
    """Assign what is new to the centroids there are; on a conflict with another run look again at what is left."""
    counting = job.counting(model.k)
    if not tables.centroids_agree():  # a run was killed between its two commits
        tables.write_centroids(model, tables.statistics(counting), job.has_saliency)
        job.result.messages.append("An earlier run was killed between its two commits: the second one was made.")
    while True:
        with contextlib.suppress(CommitConflict):
            _update_once(job, tables, model, counting)
            return


def _update_once(job: _Job, tables: ClusterTables, model: Model, counting: Counting) -> None:
    """Raises CommitConflict when another run changed the assignments meanwhile; nothing of this one is left then."""
    result = job.result
    covered = tables.covered()
    fresh, gone = _changes(job.images, covered)
    result.added, result.removed = len(fresh), len(gone)
    if not len(fresh) and not len(gone):
        _describe(result, model, tables.stored_statistics())
        result.status = "unchanged"
        return
    written = []
    if len(fresh):
        with _workers(job, fresh) as (workers, line):
            line.show(f"assigning {len(fresh):,} images")
            written = _assign(job, workers, model)
    began = time.monotonic()
    copies, replaced, taken = tables.without(covered, set(gone.to_pylist()), counting)
    added = sum((file.statistics for file in written), Statistics.zeros(model.k))
    total = tables.stored_statistics() + added - taken
    files = [file.file for file in written] + copies
    with uninterrupted():
        try:
            tables.assignments.commit(files, replaced, model.progress.run_id)
        except CommitConflict:
            tables.discard(files)
            raise
        tables.write_centroids(model, total, job.has_saliency)
    result.seconds["commit"] = time.monotonic() - began
    _describe(result, model, total)
    _say_drift(result, model)


def _changes(images: pa.Table, covered: pa.Table) -> tuple[pa.Table, pa.ChunkedArray]:
    """(images rows that are not assigned, ids that are assigned and gone or of another extraction)."""
    at = pc.index_in(images["image_id"], value_set=covered["image_id"].combine_chunks())
    same = pc.fill_null(pc.equal(covered["run_id"].take(at), images["run_id"]), False)
    kept = images["image_id"].filter(same).combine_chunks()
    gone = covered["image_id"].filter(pc.invert(pc.is_in(covered["image_id"], value_set=kept)))
    return images.filter(pc.invert(same)), gone


@contextlib.contextmanager
def _workers(job: _Job, images: pa.Table) -> Iterator[tuple[Workers, StatusLine]]:
    """Ray actors that hold the vectors of `images`."""
    from ray.exceptions import RayError

    from pipelines.cluster.training import Workers
    from pipelines.cluster.worker import ClusterWorker

    began = time.monotonic()
    asked = job.asked
    units = list_units(job.store, asked, images)
    with ray_session(job.config.run) as resources, interruptible(), StatusLine() as line:
        import ray

        layout = plan_cluster_workers(resources, job.config)
        shares = split_units(units, layout.workers)
        memory = resources.get("memory", 0.0) * CACHE_SHARE
        budget = asked.cache_gb * 1e9 if asked.cache_gb is not None else memory
        setup = _worker_setup(job, layout.device, layout.cpus, budget / max(len(shares), 1))
        # restarted for ever, each call tried again: a worker keeps nothing that it cannot read again
        actor = ray.remote(ClusterWorker).options(
            num_cpus=layout.cpus,
            num_gpus=layout.gpus,
            max_restarts=-1,
            max_task_retries=3,
            scheduling_strategy="SPREAD",
        )
        actors = [actor.remote(setup, share) for share in shares]
        job.result.seconds["start"] = time.monotonic() - began
        try:
            workers = Workers(actors)
            yield workers, line
            job.result.held_share = workers.held_share()
        except RayError as error:
            raise explain_ray_error(error, "the clustering") from None
        finally:
            for one in actors:
                ray.kill(one)


def plan_cluster_workers(resources: Mapping[str, float], config: Config) -> Layout:
    """Workers for a cluster with `resources`. Raises RequestError when what was asked is not there."""
    many_cpus = resources.get("CPU", 1.0) > MOST_CPUS_PER_WORKER
    return plan_workers(resources, config, usual_cpus=MOST_CPUS_PER_WORKER if many_cpus else 1.0)


def _worker_setup(job: _Job, device: str, cpus: float, cache_bytes: float) -> WorkerSetup:
    from pipelines.cluster.worker import WorkerSetup

    return WorkerSetup(
        reading=Reading.of_store(job.store, job.asked),
        spherical=job.asked.metric == "cosine",
        salient_above=job.store.config.store.salient_threshold,
        seed=job.asked.seed,
        device=device,
        threads=max(1, int(min(cpus, available_cpus()))),
        cache_bytes=cache_bytes,
    )


def _assign(job: _Job, workers: Workers, model: Model) -> list[Any]:
    """Files of assignments (WrittenFile); they show only once committed."""
    began = time.monotonic()
    written = workers.write(model.levels, storage.join(job.uri, "assignments"), model.progress.run_id)
    job.result.seconds["assign"] = time.monotonic() - began
    rows = sum(file.file.rows for file in written)
    if rows:
        job.result.mean_distance = sum(file.distance for file in written) / rows
    return written


def _say_drift(result: Result, model: Model) -> None:
    trained = model.progress.mean_distance
    if not result.mean_distance or not trained:
        return
    result.drift = result.mean_distance / trained
    if result.drift > DRIFT:
        result.messages.append(
            f"The {result.added:,} new images lie {result.drift - 1:.0%} farther from their centroids than those the "
            f"clusters were trained on ({result.mean_distance:.4g} to {trained:.4g}): `dinoray cluster "
            f"{result.store} {result.name}` without --update trains anew."
        )


def _describe(result: Result, model: Model, statistics: Statistics) -> None:
    about = model.progress
    result.k, result.dimension = model.k, model.dimension
    result.vectors, result.trained_on = int(statistics.sizes.sum()), about.trained_on
    result.iterations = len(about.objectives)
    result.objective = about.objectives[-1] if about.objectives else None
    result.largest = int(np.max(statistics.sizes, initial=0))
    result.empty = int((statistics.sizes == 0).sum())


class _Checkpoints:
    """Writes what a killed run continues from: after every iteration, unless that takes too much of the time."""

    def __init__(self, uri: str, options: dict[str, Any]) -> None:
        self._uri = checkpoint_uri(uri)
        self._options = options
        self._cost = 0.0
        self._written_at = -np.inf
        self._unwritten: Model | None = None

    def save(self, model: Model) -> None:
        self._unwritten = model
        if time.monotonic() - self._written_at >= self._cost / CHECKPOINT_SHARE:
            self.finish()

    def finish(self) -> None:
        """Write what was not written yet."""
        if self._unwritten is None:
            return
        began = time.monotonic()
        with uninterrupted():
            write_model(self._uri, self._unwritten, self._options)
        self._unwritten = None
        self._written_at = time.monotonic()
        self._cost = self._written_at - began
