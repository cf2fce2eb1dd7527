"""cluster --update: the centroids stay; images that are new or changed are assigned to them, those gone taken out."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.cluster import actors
from pipelines.cluster.result import ClusterJob, Result
from pipelines.cluster.vectors import clustered_images_of
from pipelines.errors import counted
from pipelines.results.cluster_models import Model
from pipelines.results.clusters import ClusterTables, Update
from pipelines.results.same_extraction import find_changes
from pipelines.running.interrupts import uninterrupted
from pipelines.store.parquet import DataFile
from pipelines.store.schemas import IMAGES
from pipelines.store.snapshots import Snapshot

if TYPE_CHECKING:
    from pipelines.cluster.worker import WrittenFile

# The mean distance of new images to their centroids, divided by that of the training.
DRIFT_WORTH_A_MESSAGE = 1.1


class AnotherTraining(Exception):
    """The clusters were trained again while an update was at work."""


def update_clusters(job: ClusterJob, tables: ClusterTables, model: Model) -> None:
    """Assign what is new to the centroids, and take out what is gone.

    What changes is decided on what the store holds in the end: images that another update assigned meanwhile are not
    assigned twice, and those that were extracted again meanwhile are left for the next one.

    Raises AnotherTraining where the clusters are no longer those of the model; nothing was changed then.
    """
    result = job.result
    fresh, _ = find_changes(job.images, tables.covered())
    written: list[WrittenFile] = []
    if len(fresh):
        with actors.started_workers(job, fresh) as (workers, line):
            line.show(f"assigning {counted(len(fresh), 'image')}")
            written = actors.assign(job, workers, model)
    assigned = {one.file.path: tables.covered_by(one.file.path) for one in written}
    ended: list[_Update] = []
    late = 0

    def decide(current: Snapshot) -> Update | None:
        nonlocal late
        ended.clear()
        if tables.training_in(current) != model.progress.run_id:
            raise AnotherTraining
        images = current.table("images", IMAGES)
        now = job.images.slice(0, 0) if images is None else clustered_images_of(images, job.asked)
        covered = tables.covered(current)
        fresh_now, gone = find_changes(now, covered)
        update = _Update(job, tables, model, current)
        update.take_out(covered, gone)
        result.added = sum(update.add(one, assigned[one.file.path], fresh_now) for one in written)
        result.removed, late = len(gone), len(fresh_now) - result.added
        ended.append(update)
        return update.asked() if update.changes else None

    began = time.monotonic()
    with uninterrupted():
        tables.update(result.run_id, decide)
    result.describe(model, ended[0].statistics)
    if ended[0].counted_again:
        result.messages.append(
            f"The clusters {result.name} were counted again, since an earlier run was killed before it said how large "
            "they are."
        )
    if late:
        result.messages.append(
            f"{counted(late, 'image')} that came, or {'was' if late == 1 else 'were'} extracted again, meanwhile "
            f"{'is' if late == 1 else 'are'} not assigned: run the same command again."
        )
    if not ended[0].changes:
        result.status = "unchanged"
        return
    result.seconds["commit"] = time.monotonic() - began
    _say_drift(result, model)


class _Update:
    """What an update changes, as one snapshot has it."""

    def __init__(self, job: ClusterJob, tables: ClusterTables, model: Model, current: Snapshot) -> None:
        self._tables = tables
        self._model = model
        self._has_saliency = job.has_saliency
        self._counting = job.counting(model.k)
        self._files = current.files(tables.path_of("assignments"))
        self._add: list[DataFile] = []
        self._remove: list[str] = []
        # a run of an older dinoray may have been killed between its commits to the two tables
        self.changes = self.counted_again = not tables.centroids_agree(current)
        if self.counted_again:
            self.statistics = tables.statistics(self._counting, self._files)
        else:
            self.statistics = tables.stored_statistics(current)

    def take_out(self, covered: pa.Table, gone: pa.ChunkedArray) -> None:
        """Images that are assigned, from the files that hold them. covered: image_id, file."""
        rows = covered.filter(pc.is_in(covered["image_id"], value_set=gone.combine_chunks()))
        by_file: dict[str, set[str]] = {}
        for image_id, path in zip(rows["image_id"].to_pylist(), rows["file"].to_pylist(), strict=True):
            by_file.setdefault(path, set()).add(image_id)
        for path, ids in sorted(by_file.items()):
            copy, taken = self._tables.copy_without(self._files[path], ids, self._counting)
            self._remove.append(path)
            self._add += [copy] if copy else []
            self.statistics -= taken
            self.changes = True

    def add(self, written: WrittenFile, assigned: pa.Table, fresh: pa.Table) -> int:
        """A file of workers, without what is not to be assigned any more; how many images come with it."""
        unknown, _ = find_changes(assigned, fresh)
        late = set(unknown["image_id"].to_pylist())
        file: DataFile | None = written.file
        coming = written.statistics
        if late:
            file, taken = self._tables.copy_without(written.file, late, self._counting)
            coming -= taken
        if file is not None:
            self._add.append(file)
            self.statistics += coming
            self.changes = True
        return len(assigned) - len(late)

    def asked(self) -> Update:
        return Update(self._add, self._remove, self._model, self.statistics, self._has_saliency)


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
