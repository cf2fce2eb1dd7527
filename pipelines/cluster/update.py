"""cluster --update: the centroids stay; images that are new or changed are assigned to them, those gone taken out."""

from __future__ import annotations

import contextlib
import time

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.cluster import actors
from pipelines.cluster.result import ClusterJob, Result
from pipelines.errors import counted
from pipelines.results.cluster_models import Model
from pipelines.results.cluster_statistics import Counting, Statistics
from pipelines.results.clusters import ClusterTables
from pipelines.running.interrupts import uninterrupted
from pipelines.store.table import CommitConflict

# The mean distance of new images to their centroids, divided by that of the training.
DRIFT_WORTH_A_MESSAGE = 1.1


def update_clusters(job: ClusterJob, tables: ClusterTables, model: Model) -> None:
    """Assign what is new to the centroids; after a conflict with another run, look again at what is left."""
    counting = job.counting(model.k)
    # a run may have been killed between its two commits
    if not tables.centroids_agree():
        tables.write_centroids(model, tables.statistics(counting), job.has_saliency)
        job.result.messages.append("An earlier run was killed between its two commits: this run made the second one.")
    while True:
        with contextlib.suppress(CommitConflict):
            _update_once(job, tables, model, counting)
            return


def _update_once(job: ClusterJob, tables: ClusterTables, model: Model, counting: Counting) -> None:
    """Raises CommitConflict when another run changed the assignments meanwhile; nothing of this one is left then."""
    result = job.result
    covered = tables.covered()
    fresh, gone = find_changes(job.images, covered)
    result.added, result.removed = len(fresh), len(gone)
    if not len(fresh) and not len(gone):
        result.describe(model, tables.stored_statistics())
        result.status = "unchanged"
        return
    written = []
    if len(fresh):
        with actors.started_workers(job, fresh) as (workers, line):
            line.show(f"assigning {counted(len(fresh), 'image')}")
            written = actors.assign(job, workers, model)
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
    result.describe(model, total)
    _say_drift(result, model)


def find_changes(images: pa.Table, covered: pa.Table) -> tuple[pa.Table, pa.ChunkedArray]:
    """(images rows that are not assigned, ids that are assigned but gone or extracted again)."""
    at = pc.index_in(images["image_id"], value_set=covered["image_id"].combine_chunks())
    same = pc.fill_null(pc.equal(covered["run_id"].take(at), images["run_id"]), False)
    kept = images["image_id"].filter(same).combine_chunks()
    gone = covered["image_id"].filter(pc.invert(pc.is_in(covered["image_id"], value_set=kept)))
    return images.filter(pc.invert(same)), gone


def _say_drift(result: Result, model: Model) -> None:
    trained = model.progress.mean_distance
    if not result.mean_distance or not trained:
        return
    result.drift = result.mean_distance / trained
    if result.drift > DRIFT_WORTH_A_MESSAGE:
        lie, their = ("lies", "its") if result.added == 1 else ("lie", "their")
        result.messages.append(
            f"The {counted(result.added, 'new image')} {lie} {result.drift - 1:.0%} farther from {their} centroids "
            f"than those the clusters were trained on ({result.mean_distance:.4g} to {trained:.4g}): `dinoray cluster "
            f"{result.store} {result.name}` without --update trains from scratch."
        )
