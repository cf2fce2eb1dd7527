"""clusters/NAME in a store: the tables `assignments` and `centroids`, and the training that made them.

Both tables and a pointer to the model change in one transaction. The names of the tables' files carry the run_id of the
training, which finds its model; the pointer has the model's checksum, and keeps it from being taken for a leftover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import JobError, counted
from pipelines.results.cluster_models import Model, checkpoint_uri, model_uri, read_model, write_model
from pipelines.results.cluster_statistics import Counting, Statistics
from pipelines.results.names import result_uri
from pipelines.results.stored import ResultTables
from pipelines.store.changes import Change, Pointer, TableChange
from pipelines.store.damage import DamagedResult, gone, run_repair
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.parquet import DataFile, new_file_name, open_parquet, run_id_of
from pipelines.store.publishing import number_of
from pipelines.store.rewriting import rewrite_without
from pipelines.store.rows import row_count
from pipelines.store.schemas import ASSIGNMENTS, CENTROIDS, vector
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.table import READS_AT_ONCE, Table
from pipelines.store.transactions import transact
from pipelines.store.written_files import WrittenFiles


def clusters_uri(store: str, name: str) -> str:
    """Raises RequestError for a name that cannot be a folder's."""
    return result_uri(store, "clusters", name)


@dataclass(frozen=True)
class Update:
    """Files of assignments that come and go, and the statistics of all clusters after it."""

    add: list[DataFile]
    remove: list[str]
    model: Model
    statistics: Statistics
    has_saliency: bool


class ClusterTables(ResultTables):
    """The two tables of one NAME at the versions last refreshed."""

    kind = "clusters"
    schemas: ClassVar = {"assignments": ASSIGNMENTS, "centroids": CENTROIDS}
    leading = "assignments"
    command = "cluster"

    def prepare(self) -> None:
        self._covered: dict[str, pa.Table] = {}
        self._written = WrittenFiles()
        self._taken_out: dict[tuple[str, frozenset[str]], Statistics] = {}

    @property
    def assignments(self) -> Table:
        return self.tables["assignments"]

    @property
    def centroids(self) -> Table:
        return self.tables["centroids"]

    def row_counts(self) -> dict[str, int]:
        return {"clusters": row_count(self.centroids), "assignments": row_count(self.assignments)}

    def describe(self, counts: dict[str, int]) -> str:
        return f"{counted(counts['clusters'], 'cluster')}, {counted(counts['assignments'], 'assignment')}"

    def missing(self) -> str:
        if said := super().missing():
            return said
        try:
            self.model()
        except JobError as error:
            return str(error)
        return ""

    def linked_tables(self) -> Iterator[LinkedTables]:
        yield LinkedTables(self.assignments, run_in_names=True)
        yield LinkedTables(self.centroids, run_in_names=True)

    def model(self) -> Model | None:
        """The model that the tables were made with, or None for empty tables.

        Raises JobError when its file is gone or damaged.
        """
        runs = {training_of(path) for path in self.assignments.files()}
        if not runs:
            return None
        if len(runs) > 1:
            raise DamagedResult(f"{self.assignments.uri} mixes several trainings: {run_repair(self.log.uri)}.")
        run_id = runs.pop()
        uri = model_uri(self.uri, run_id)
        pointer = snapshot(self.log).pointers.get(self.path)
        checksum = pointer.checksum if pointer and pointer.file == self._model_path(run_id) else None
        model = read_model(uri, self.options, checksum)
        if model is None:
            raise DamagedResult(gone(uri, self.log.uri))
        return model

    def training_in(self, current: Snapshot) -> str:
        """The run_id of the training that the tables of a snapshot come from; "" for empty tables.

        Raises JobError for several.
        """
        runs = {training_of(path) for path in current.files(self.path_of("assignments"))}
        if len(runs) > 1:
            raise DamagedResult(f"{self.assignments.uri} mixes several trainings: {run_repair(self.log.uri)}.")
        return runs.pop() if runs else ""

    def _model_path(self, run_id: str) -> str:
        return model_uri(self.path, run_id)

    def covered(self, current: Snapshot | None = None) -> pa.Table:
        """The images that are assigned: image_id, run_id (of the extraction), file (of assignments).

        current: default the newest; of each only the files that are new are read.
        """
        files = (current or snapshot(self.log)).files(self.path_of("assignments"))
        new = [path for path in files if path not in self._covered]
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            self._covered |= dict(zip(new, pool.map(self.covered_by, new), strict=True))
        self._covered = {path: self._covered[path] for path in files}
        schema = pa.schema([("image_id", pa.string()), ("run_id", pa.string()), ("file", pa.string())])
        return pa.concat_tables([schema.empty_table(), *(rows.cast(schema) for rows in self._covered.values())])

    def covered_by(self, path: str) -> pa.Table:
        """The images that a file of assignments holds: image_id, run_id, file."""
        found = []
        with open_parquet(storage.join(self.assignments.uri, path), self.options) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=["image_id", "run_id"]).combine_chunks()
                stretches = pc.run_end_encode(rows["image_id"].combine_chunks())
                starts = np.concatenate([[0], np.asarray(stretches.run_ends, np.int64)])[:-1]
                found.append(rows.take(pa.array(starts)))
        rows = pa.concat_tables(found).group_by(["image_id", "run_id"]).aggregate([])
        return rows.select(["image_id", "run_id"]).append_column("file", pa.array([path] * len(rows), pa.string()))

    def replace(
        self,
        model: Model,
        files: list[DataFile],
        statistics: Statistics,
        has_saliency: bool,
        gives_way: Callable[[Snapshot, str], bool] = lambda current, training: False,
    ) -> bool:
        """Write a training's model, and make its clusters visible in place of what is there. Returns whether it did.

        gives_way: whether this training should, to the one in a snapshot.
        """
        done = [True]
        centroids = self._centroids_file(model, statistics, has_saliency)
        run_id = model.progress.run_id
        # what comes is looked at when it is decided: one that is gone by then is said
        checksum = write_model(model_uri(self.uri, run_id), model, self.options)
        pointer = Pointer(self._model_path(run_id), checksum)

        def build(current: Snapshot) -> Change | None:
            done[0] = not gives_way(current, self.training_in(current))
            if not done[0]:
                return None
            old = {table: list(current.files(self.path_of(table))) for table in self.schemas}
            return Change(self._changes({"centroids": [centroids], "assignments": files}, old), {self.path: pointer})

        transact(self.log, build, run_id=run_id, command="cluster")
        self.refresh()
        return done[0]

    def update(
        self, run_id: str, decide: Callable[[Snapshot], Update | None], command: str = "cluster --update"
    ) -> None:
        """Change assignments, and the centroids with them. decide: what changes, from a snapshot; it may be asked again
        about a newer one. run_id: of who asks."""
        change: Change | None = None

        def build(current: Snapshot) -> Change | None:
            nonlocal change
            change, asked = None, decide(current)
            if asked is not None:
                centroids = self._centroids_file(asked.model, asked.statistics, asked.has_saliency)
                self._written.once(self.centroids, centroids.path, lambda: centroids)
                old = {"centroids": list(current.files(self.path_of("centroids"))), "assignments": asked.remove}
                change = Change(self._changes({"centroids": [centroids], "assignments": asked.add}, old))
            return change

        transact(self.log, build, run_id=run_id, command=command)
        self._written.remove_unused(change)
        self.refresh()

    def _changes(self, add: Mapping[str, list[DataFile]], remove: Mapping[str, list[str]]) -> list[TableChange]:
        """Assignments last: they say which images are done."""
        return [
            TableChange(self.path_of(table), self.schemas[table], add[table], remove[table])
            for table in ("centroids", "assignments")
            if add[table] or remove[table]
        ]

    def _centroids_file(self, model: Model, statistics: Statistics, has_saliency: bool) -> DataFile:
        rows = centroid_rows(model, statistics, has_saliency)
        return self.centroids.write_file(new_file_name(model.progress.run_id), rows)

    def statistics(self, counting: Counting, files: Iterable[str] | None = None) -> Statistics:
        """Statistics of the rows of some files of assignments, or of all."""
        columns = ["image_id", "cluster_id", "distance", "saliency"]

        def one(path: str) -> Statistics:
            return Statistics.of(self.assignments.read_file(path, columns), counting)

        total = Statistics.zeros(counting.k)
        # each reader holds a whole file
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(one, self.assignments.files() if files is None else files):
                total += found
        return total

    def stored_statistics(self, current: Snapshot | None = None) -> Statistics:
        """Statistics as the table of centroids has them. current: default the newest."""
        table = (current or snapshot(self.log)).table(self.path_of("centroids"), CENTROIDS) or self.centroids
        rows = table.read(["cluster_id", "size", "inertia", "salient_votes"]).sort_by("cluster_id")
        votes = pc.fill_null(rows["salient_votes"], 0)
        return Statistics(rows["size"].to_numpy(), rows["inertia"].to_numpy(), votes.to_numpy())

    def centroids_agree(self, current: Snapshot | None = None) -> bool:
        """Whether the centroids come from the same training as the assignments, and their sizes count all of them.

        Centroids that came by a transaction do. Those of an older dinoray may not, which changed the tables one after
        the other: their assignments are counted.
        """
        current = current or snapshot(self.log)
        assignments, centroids = (current.files(self.path_of(table)) for table in ("assignments", "centroids"))
        if {training_of(path) for path in centroids} != {training_of(path) for path in assignments}:
            return False
        if changed_by_transaction(current, self.path_of("centroids")):
            return True
        sizes = self.stored_statistics(current).sizes
        if int(sizes.sum()) != sum(file.rows for file in assignments.values()):
            return False
        counted_ones = np.zeros(len(sizes), np.int64)
        for path in assignments:
            clusters = self.assignments.read_file(path, ["cluster_id"])["cluster_id"].to_numpy()
            counted_ones += np.bincount(clusters, minlength=len(sizes))[: len(sizes)]
        return bool(np.array_equal(sizes, counted_ones))

    def copy_without(
        self, file: DataFile, image_ids: set[str], counting: Counting
    ) -> tuple[DataFile | None, Statistics]:
        """(a file of assignments without some images, None where nothing is left; statistics of the rows that go).

        Made once, however often it is asked for.
        """
        known = (file.path, frozenset(image_ids))
        if known not in self._taken_out:
            rows = self.assignments.read_file(file.path, ["image_id", "cluster_id", "distance", "saliency"])
            rows = rows.filter(pc.is_in(rows["image_id"], value_set=pa.array(sorted(image_ids), pa.string())))
            self._taken_out[known] = Statistics.of(rows, counting)
        training = training_of(file.path)
        copy = self._written.once(
            self.assignments, known, lambda: rewrite_without(self.assignments, file, image_ids, training)
        )
        return copy, self._taken_out[known]


def changed_by_transaction(current: Snapshot, table: str) -> bool:
    """Whether any transaction has changed a table yet."""
    current.version(table)  # opens it
    delta = current.opened[table]
    return delta is not None and number_of(delta) > 0


def checkpoint(clusters: str, options: storage.Options) -> Model | None:
    """What a training that did not end left, or None. Raises JobError for a checkpoint that is damaged."""
    return read_model(checkpoint_uri(clusters), options)


def centroid_rows(model: Model, statistics: Statistics, has_saliency: bool) -> pa.Table:
    centroids = model.levels[-1].centroids.astype(np.float32)
    k, dimension = centroids.shape
    offsets = pa.array(np.arange(0, (k + 1) * dimension, dimension, dtype=np.int32))
    columns: list[Any] = [
        pa.array(np.arange(k, dtype=np.int32)),
        pa.array(statistics.sizes, pa.int64()),
        pa.array(statistics.inertia, pa.float64()),
        pa.array(statistics.votes, pa.int64()) if has_saliency else pa.nulls(k, pa.int64()),
        pa.ListArray.from_arrays(offsets, pa.array(centroids.reshape(-1)), type=vector(pa.float32())),
    ]
    return pa.Table.from_arrays(columns, schema=CENTROIDS)


def training_of(path: str) -> str:
    """The run_id of the training that a file of either table comes from."""
    return run_id_of(path)
