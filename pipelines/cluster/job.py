"""cluster: patches (or images) of a store become clusters/NAME/centroids and clusters/NAME/assignments.

    what there is -> workers hold it -> k-means -> every vector assigned -> both tables replaced

With `update` the centroids stay: images that are new or changed are assigned to them, those that are gone taken out.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.cluster import actors
from pipelines.cluster.result import ClusterJob
from pipelines.cluster.result import Result as Result
from pipelines.cluster.update import AnotherTraining, update_clusters
from pipelines.cluster.vectors import (
    check_store,
    clustered_images,
    clustered_images_of,
    digest,
)
from pipelines.errors import JobError, RequestError, counted
from pipelines.results.cluster_models import Model, Progress, checkpoint_uri, model_uri, read_model, write_model
from pipelines.results.cluster_statistics import Statistics
from pipelines.results.clusters import ClusterTables, checkpoint, clusters_uri
from pipelines.results.same_extraction import find_changes
from pipelines.running.interrupts import uninterrupted
from pipelines.running.reports import RunReport, new_run_id, recorded
from pipelines.settings.differences import differences
from pipelines.settings.loading import make_config
from pipelines.settings.sections import ClusterSettings, Config
from pipelines.store.schemas import IMAGES
from pipelines.store.snapshots import Snapshot
from pipelines.store.store import Store

# Amir et al. 2021, supplementary material.
PUBLISHED_ELBOW = 0.975
MOST_TIME_SHARE_OF_CHECKPOINTS = 0.1


def run(
    config: Config, *, store: str, name: str, elbow: bool = False, update: bool = False, dry_run: bool = False
) -> Result:
    """Cluster the patches or embeddings of `store`; the same command continues a training that was killed.

    Args:
        name: NAME of the result, clusters/NAME in the store.
        elbow: choose k as cluster.elbow says, or as published.
        update: keep the centroids and assign what is new; train where there are none.
        dry_run: plan only; nothing is written.

    Raises:
        RequestError: the request was wrong.
        JobError: the job failed; what was there stays.
    """
    started = time.monotonic()
    if elbow and config.cluster.elbow is None:
        given = config.cluster.model_dump(include=config.cluster.model_fields_set)
        config = make_config({**config.model_dump(exclude={"cluster"}), "cluster": {**given, "elbow": PUBLISHED_ELBOW}})
    opened = (Store.open if dry_run else Store.open_for_writing)(store, config)
    options = config.storage.options
    uri = clusters_uri(opened.uri, name)
    tables = ClusterTables.open_existing(opened.uri, name, options, opened.log)
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
    job = ClusterJob(opened, asked, config, images, uri, result)
    if dry_run:
        _plan(job, tables, model)
        return result.ended("dry_run", started)
    if tables and model and not update and _same(job, model) and tables.centroids_agree():
        result.describe(model, tables.stored_statistics())
        return result.ended("unchanged", started)

    report = RunReport("cluster", opened.uri, config, result.run_id, {"name": name, "update": update})
    with recorded(report, result, started, told=opened.log.messages, fingerprint=opened.fingerprint):
        result.seconds["plan"] = time.monotonic() - started
        if result.what == "update":
            assert tables is not None and model is not None
            _update(job, tables, model)
        else:
            _train(job, model)
    return result


def _settings(asked: ClusterSettings, model: Model | None, name: str) -> ClusterSettings:
    """The settings that a model was trained with, which an update keeps.

    Raises RequestError when others are asked for.
    """
    if model is None:
        return asked
    stored = model.progress.settings
    given = asked.model_dump(mode="json", include=asked.model_fields_set & stored.keys())
    differing = differences(stored, given, "cluster.{key}: trained with {before}, requested {asked}", only=given)
    if differing:
        raise RequestError(
            f"The clusters {name} were trained with other settings ({'; '.join(differing)}), and an update keeps its "
            "centroids: leave these settings out, give another NAME, or train again without --update."
        )
    fields = {key: value for key, value in stored.items() if key in ClusterSettings.model_fields}
    return ClusterSettings.model_validate({**fields, "cache_gb": asked.cache_gb})


def _refuse_another_kind(uri: str, name: str, model: Model, asked: ClusterSettings) -> None:
    """Raises RequestError for clusters of patches where images are to be clustered, or the other way round."""
    if (before := model.progress.settings["of"]) != asked.of:
        raise RequestError(
            f"The clusters {name} are of {before}, and {asked.of} were requested: give another NAME for these, or "
            f"remove {uri}."
        )


def _same(job: ClusterJob, model: Model) -> bool:
    """Whether a model was trained with the same settings on the same images."""
    return model.progress.settings == job.settings and model.progress.images == digest(job.images)


def _why_again(job: ClusterJob, before: Model) -> str:
    differing = differences(before.progress.settings, job.settings, "cluster.{key} was {before}", only=job.settings)
    return f"since other settings were given ({', '.join(differing)})" if differing else "since the images have changed"


def _plan(job: ClusterJob, tables: ClusterTables | None, model: Model | None) -> None:
    """Say what a run would do."""
    result = job.result
    if result.what == "update":
        assert tables is not None
        fresh, gone = find_changes(job.images, tables.covered())
        result.added, result.removed = len(fresh), len(gone)
        return
    files = job.store.patches.files() if job.asked.of == "patches" else job.store.images.files()
    result.vectors = sum(file.rows for file in files.values())
    left = checkpoint(job.uri, job.config.storage.options)
    if left is not None and _same(job, left):
        result.resumed_from = len(left.progress.objectives)
    result.k = job.asked.k
    if model is not None and not _same(job, model):
        result.messages.append(f"The clusters {result.name} would be trained again, {_why_again(job, model)}.")


def _update(job: ClusterJob, tables: ClusterTables, model: Model) -> None:
    """Update the clusters, and those of another training where one replaced them meanwhile."""
    while True:
        try:
            return update_clusters(job, tables, model)
        except AnotherTraining:
            tables.refresh()
            found = tables.model()
        if found is None:
            raise JobError(f"{job.uri} was removed while it was updated: run the same command again.")
        model, name = found, job.result.name
        asked = _settings(job.config.cluster, model, name)
        _refuse_another_kind(job.uri, name, model, asked)
        for table in (job.store.images, job.store.patches):
            table.refresh()
        job = replace(job, asked=asked, images=clustered_images(job.store, asked))
        job.result.images = len(job.images)
        job.result.messages.append(
            f"The clusters {name} were trained again by another run meanwhile: this run updated the new ones."
        )


def _train(job: ClusterJob, before: Model | None) -> None:
    """Train, assign everything, and put the result in place of what was there."""
    result, options = job.result, job.config.storage.options
    model = checkpoint(job.uri, options)
    if before is not None and _same(job, before):
        # a run of an older dinoray was killed between its two commits
        model = before
    if model is None or not _same(job, model):
        model = Model(Progress(result.run_id, job.settings, digest(job.images)), [])
    if before is not None and not _same(job, before):
        result.messages.append(f"The clusters {result.name} were trained again, {_why_again(job, before)}.")
    result.resumed_from = len(model.progress.objectives)
    if result.resumed_from and not model.progress.trained:
        result.messages.append(f"Continued after iteration {result.resumed_from} of an earlier run.")
    from pipelines.cluster.training import train

    checkpoints = _Checkpoints(job.uri, options)
    with actors.started_workers(job, job.images) as (workers, line):
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
        # whoever ends a training gives it its name, so that of two that continue one none writes over the other's model
        model.progress.run_id = result.run_id
        # before files lie in their folders, which without a log look as if it had been lost
        tables = ClusterTables.open_or_make(job.store.uri, result.name, options, job.store.log)
        written = actors.assign(job, workers, model)
    total = sum((file.statistics for file in written), Statistics.zeros(model.k))
    model.progress.mean_distance = result.mean_distance
    began = time.monotonic()
    with uninterrupted():
        files, gives_way = [file.file for file in written], _GivesWay(job, tables, before)
        if not tables.replace(model, files, total, job.has_saliency, gives_way):
            assert gives_way.to
            model, total = gives_way.to, tables.stored_statistics()
            result.messages.append(
                f"Another run trained the same clusters {result.name} at the same time: its clusters were kept."
            )
        elif gives_way.late:
            result.messages.append(
                f"{counted(gives_way.late, 'image')} came, changed or went while the clusters {result.name} were "
                f"trained, which are of the images before that: run the same command again, or with --update."
            )
        _remove_checkpoint(job)
    result.seconds["commit"] = time.monotonic() - began
    result.describe(model, total)


class _GivesWay:
    """Whether a training gives way to one that another run ended since this one was planned: where that one has the
    same settings, and the same images or those that the store holds now. to: that one. late: images that the store
    holds otherwise than when this training was planned."""

    def __init__(self, job: ClusterJob, tables: ClusterTables, before: Model | None) -> None:
        self._job = job
        self._tables = tables
        self._known = before.progress.run_id if before else ""
        self.to: Model | None = None
        self.late = 0

    def __call__(self, current: Snapshot, training: str) -> bool:
        job, images = self._job, current.table("images", IMAGES)
        now = job.images.slice(0, 0) if images is None else clustered_images_of(images, job.asked)
        fresh, gone = find_changes(now, job.images)
        self.late = len(set(fresh["image_id"].to_pylist()).union(gone.to_pylist()))
        if training in ("", self._known):
            return False
        self.to = read_model(model_uri(job.uri, training), self._tables.options)
        if self.to is None or self.to.progress.settings != job.settings:
            return False
        return self.to.progress.images in (digest(job.images), digest(now))


def _remove_checkpoint(job: ClusterJob) -> None:
    """Remove what this training would have continued from, and not that of another one."""
    options = job.config.storage.options
    left = checkpoint(job.uri, options)
    if left is not None and _same(job, left):
        fs, path = storage.filesystem(checkpoint_uri(job.uri), options)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)


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
        if time.monotonic() - self._written_at >= self._cost / MOST_TIME_SHARE_OF_CHECKPOINTS:
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
