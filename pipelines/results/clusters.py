"""clusters/NAME in a store: the tables `assignments` and `centroids`, and the training that made them.

Both tables are replaced together: assignments first, then centroids, whose rows say how many assignments there are. The
names of their files carry the run_id of the training, which finds its model. What a killed run left between the two
commits shows in that, and `repair` completes it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import JobError, counted
from pipelines.results.cluster_models import Model, checkpoint_uri, model_uri, read_model
from pipelines.results.cluster_statistics import Counting, Statistics
from pipelines.results.names import result_uri
from pipelines.results.stored import ResultTables
from pipelines.store.commit import retry_on_conflict
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.parquet import DataFile, new_file_name, open_parquet, run_id_of
from pipelines.store.rewriting import rewrite_without
from pipelines.store.rows import row_count
from pipelines.store.schemas import ASSIGNMENTS, CENTROIDS, vector
from pipelines.store.table import READS_AT_ONCE, Table

LEFTOVER_MODEL_KEPT_DAYS = 1


def clusters_uri(store: str, name: str) -> str:
    """Raises RequestError for a name that cannot be a folder's."""
    return result_uri(store, "clusters", name)


class ClusterTables(ResultTables):
    """The two tables of one NAME at the versions last refreshed."""

    kind = "clusters"
    schemas: ClassVar = {"assignments": ASSIGNMENTS, "centroids": CENTROIDS}
    leading = "assignments"

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

        Raises JobError when its file is gone.
        """
        runs = {training_of(path) for path in self.assignments.files()}
        if not runs:
            return None
        if len(runs) > 1:
            raise JobError(f"{self.assignments.uri} mixes several trainings: remove {self.uri} and cluster again.")
        uri = model_uri(self.uri, runs.pop())
        model = read_model(uri, self.options)
        if model is None:
            raise JobError(f"{uri} is gone, and {self.uri} was made with it: remove {self.uri} and cluster again.")
        return model

    def covered(self) -> pa.Table:
        """The images that are assigned: image_id, run_id (of the extraction), file (of assignments)."""

        def one(path: str) -> pa.Table:
            found = []
            uri = storage.join(self.assignments.uri, path)
            with open_parquet(uri, self.options) as parquet:
                for group in range(parquet.num_row_groups):
                    rows = parquet.read_row_group(group, columns=["image_id", "run_id"]).combine_chunks()
                    stretches = pc.run_end_encode(rows["image_id"].combine_chunks())
                    starts = np.concatenate([[0], np.asarray(stretches.run_ends, np.int64)])[:-1]
                    found.append(rows.take(pa.array(starts)))
            rows = pa.concat_tables(found).group_by(["image_id", "run_id"]).aggregate([])
            return rows.append_column("file", pa.array([path] * len(rows), pa.string()))

        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            found = list(pool.map(one, self.assignments.files()))
        schema = pa.schema([("image_id", pa.string()), ("run_id", pa.string()), ("file", pa.string())])
        return pa.concat_tables([schema.empty_table(), *(rows.select(schema.names).cast(schema) for rows in found)])

    def replace(self, model: Model, files: list[DataFile], statistics: Statistics, has_saliency: bool) -> None:
        """Make a training's clusters visible in place of what was there.

        Raises JobError when another run did the same at the same time and finished later.
        """
        run_id = model.progress.run_id

        def assign() -> None:
            self.assignments.commit(files, list(self.assignments.files()), run_id)

        retry_on_conflict(assign)
        self.write_centroids(model, statistics, has_saliency)

    def write_centroids(self, model: Model, statistics: Statistics, has_saliency: bool) -> None:
        """Replace the table of centroids."""
        run_id = model.progress.run_id
        rows = centroid_rows(model, statistics, has_saliency)
        file = self.centroids.write_file(new_file_name(run_id), rows)

        def commit() -> None:
            self.assignments.refresh()
            if {training_of(path) for path in self.assignments.files()} != {run_id}:
                raise JobError(
                    f"Another run replaced the clusters at {self.uri} at the same time, and its result stands: run the "
                    "same command again if it should be this one's."
                )
            self.centroids.commit([file], list(self.centroids.files()), run_id)

        retry_on_conflict(commit)

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

    def stored_statistics(self) -> Statistics:
        """Statistics as the table of centroids has them."""
        rows = self.centroids.read(["cluster_id", "size", "inertia", "salient_votes"]).sort_by("cluster_id")
        votes = pc.fill_null(rows["salient_votes"], 0)
        return Statistics(rows["size"].to_numpy(), rows["inertia"].to_numpy(), votes.to_numpy())

    def centroids_agree(self) -> bool:
        """Whether the centroids come from the same training as the assignments, and their sizes count all of them."""
        files = self.assignments.files()
        runs = {training_of(path) for path in self.centroids.files()}
        if runs != {training_of(path) for path in files}:
            return False
        return int(self.stored_statistics().sizes.sum()) == sum(file.rows for file in files.values())

    def without(
        self, covered: pa.Table, image_ids: set[str], counting: Counting
    ) -> tuple[list[DataFile], list[str], Statistics]:
        """What removing images takes: (files to add, files to remove, statistics of the rows that go).

        covered: what `covered` returned, whose files hold the images.
        """
        gone = pa.array(sorted(image_ids), pa.string())
        affected = pc.unique(covered["file"].filter(pc.is_in(covered["image_id"], value_set=gone))).to_pylist()
        add, removed = [], Statistics.zeros(counting.k)
        files = self.assignments.files()
        for path in affected:
            rows = self.assignments.read_file(path, ["image_id", "cluster_id", "distance", "saliency"])
            removed += Statistics.of(rows.filter(pc.is_in(rows["image_id"], value_set=gone)), counting)
            copy = rewrite_without(self.assignments, files[path], image_ids, training_of(path))
            add += [copy] if copy else []
        return add, affected, removed

    def remove_leftovers(self) -> None:
        """Remove the checkpoint, and models of earlier trainings, but not those of a run that may be at work now."""
        fs, folder = storage.filesystem(storage.join(self.uri, "model"), self.options)
        in_use = {f"{training_of(path)}.npz" for path in self.assignments.files()}
        before = f"{dt.datetime.now(dt.UTC) - dt.timedelta(days=LEFTOVER_MODEL_KEPT_DAYS):%Y%m%dT%H%M%SZ}"
        for path in fs.ls(folder, detail=False):
            name = path.rsplit("/", 1)[-1]
            if name == "checkpoint.npz" or (name not in in_use and name < before):
                fs.rm_file(path)

    def discard(self, files: Iterable[DataFile]) -> None:
        """Remove files of assignments that were never committed."""
        for file in files:
            fs, path = storage.filesystem(storage.join(self.assignments.uri, file.path), self.options)
            if fs.exists(path):
                fs.rm_file(path)


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
