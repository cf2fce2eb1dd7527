"""Clusters change whole, whatever is killed, and whatever training or update comes between any two steps of a run."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from changes_in_steps import commits_in_order
from deltalake import DeltaTable
from every_step import at_every_step, die
from flipped_bits import flip_bit
from hand_made import add_described, described
from local_clusters import use_local_workers
from small_runs import settings
from storage_steps import at_step

from pipelines.cluster import job as cluster
from pipelines.errors import JobError
from pipelines.results import cluster_checks
from pipelines.results.clusters import ClusterTables
from pipelines.store.changes import Change, TableChange
from pipelines.store.parquet import new_file_name
from pipelines.store.rewriting import merge_files
from pipelines.store.schemas import ASSIGNMENTS
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.store import Store
from pipelines.store.transactions import transact

NAME = "words"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_workers(monkeypatch)


def add(store: str, run: int, images: str) -> None:
    """Images that are new or changed, one for each letter, 2 x 3 patches each."""
    made = {
        one: described(np.random.default_rng([run, ord(one)]).standard_normal((2, 3, 4)).astype(np.float32))
        for one in images
    }
    add_described(Store.open(store, settings()), f"2020010{run}T000000Z-00000{run}", made, f"v{run}")


def run(store: str, *overrides: str, **options: Any) -> cluster.Result:
    return cluster.run(settings("cluster.k=3", "cluster.iterations=3", *overrides), store=store, name=NAME, **options)


def update(store: str) -> cluster.Result:
    return cluster.run(settings(), store=store, name=NAME, update=True)


def holds(store: str) -> None:
    """Both tables and the model agree, and patches are those that the store holds."""
    fits(store)
    files = {name: DeltaTable(f"{store}/{name}").file_uris() for name in ("patches", f"clusters/{NAME}/assignments")}
    columns = "image_id, row, col"
    of_store, of_clusters = (
        duckdb.sql(f"select {columns} from read_parquet({one}) order by all").fetchall() for one in files.values()
    )
    assert of_store == of_clusters
    images = DeltaTable(f"{store}/images").to_pyarrow_table(columns=["image_id", "run_id"]).to_pylist()
    tables = ClusterTables.open_existing(store, NAME, {})
    assert tables is not None
    covered = tables.covered().select(["image_id", "run_id"]).to_pylist()
    assert sorted(covered, key=str) == sorted(images, key=str)


def fits(store: str) -> None:
    """Both tables and the model agree with each other."""
    tables = ClusterTables.open_existing(store, NAME, {})
    assert tables is not None and list(cluster_checks.disagreements(tables)) == []


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Clusters of images a to f, of which b was extracted again since, and g is new."""
    store = Store.create(str(tmp_path / "store"), settings()).uri
    add(store, 1, "abcdef")
    run(store)
    add(store, 2, "bg")
    return tmp_path / "store"


def test_an_update_is_killed_at_any_step_and_another_goes_on(begun: Path, tmp_path: Path) -> None:
    for store in at_every_step(begun, tmp_path, update, die):
        fits(store)
        add(store, 3, "ah")
        update(store)
        holds(store)


def test_a_training_is_killed_at_any_step_and_an_update_goes_on(begun: Path, tmp_path: Path) -> None:
    for store in at_every_step(begun, tmp_path, run, die):
        fits(store)
        update(store)
        holds(store)


def test_two_updates_over_different_images(begun: Path, tmp_path: Path) -> None:
    """The sizes of clusters count the patches of both, whichever comes last."""

    def other(store: str) -> None:
        add(store, 3, "bh")
        update(store)

    for store in at_every_step(begun, tmp_path, update, other):
        holds(store)


@pytest.mark.slow
def test_a_training_that_ends_while_an_update_is_at_work(begun: Path, tmp_path: Path) -> None:
    """The update starts over on the new clusters, and no table mixes two trainings."""

    def other(store: str) -> None:
        run(store)
        add(store, 3, "bh")

    began_again = 0
    results: list[cluster.Result] = []
    for store in at_every_step(begun, tmp_path, lambda store: results.append(update(store)), other):
        fits(store)
        began_again += any("trained again by another run" in message for message in results[-1].messages)
        update(store)
        holds(store)
    assert began_again > 2


@pytest.mark.slow
def test_an_update_that_ends_while_a_training_is_at_work(begun: Path, tmp_path: Path) -> None:
    def other(store: str) -> None:
        add(store, 3, "bh")
        update(store)

    for store in at_every_step(begun, tmp_path, run, other):
        fits(store)
        update(store)
        holds(store)


def test_a_training_says_what_it_does_not_follow(begun: Path) -> None:
    """An update has assigned b, extracted again, and h, which are not what the training began with."""
    store = str(begun)

    def other() -> None:
        add(store, 3, "bh")
        update(store)

    with at_step(0, other):
        said = run(store).messages
    assert any(one.startswith("2 images came") and "run the same command again" in one for one in said)
    fits(store)
    assert not any("run the same command" in one for one in run(store).messages)
    holds(store)


def test_files_are_merged_while_an_update_is_at_work(begun: Path, tmp_path: Path) -> None:
    def merge(store: str) -> None:
        tables = ClusterTables.open_or_make(store, NAME, {})
        path = tables.path_of("assignments")

        def build(current: Snapshot) -> Change:
            old = current.files(path)
            name = new_file_name(tables.training_in(current))
            merged = merge_files(tables.assignments, list(old.values()), name)
            return Change([TableChange(path, ASSIGNMENTS, [merged], list(old), rearranges=True)])

        transact(tables.log, build, run_id="compact", command="compact")

    for store in at_every_step(begun, tmp_path, update, merge):
        holds(store)
        add(store, 3, "bh")
        update(store)
        holds(store)


def test_two_trainings_at_once(begun: Path, tmp_path: Path) -> None:
    """The second gives way to the first where both do the same, and otherwise replaces it whole."""
    gave_way = 0
    results: list[cluster.Result] = []
    for store in at_every_step(begun, tmp_path, lambda store: results.append(run(store)), run):
        gave_way += any("its clusters were kept" in message for message in results[-1].messages)
        holds(store)
        assert run(store).status == "unchanged"
    assert gave_way > 2
    for number in (0, 4):
        store = str(shutil.copytree(begun, tmp_path / f"other-{number}"))
        with at_step(number, partial(run, store, "cluster.seed=5")):
            run(store)
        holds(store)
        assert run(store).status == "unchanged"


def test_two_first_trainings_at_once(tmp_path: Path) -> None:
    add(Store.create(str(tmp_path / "store"), settings()).uri, 1, "abcd")
    for store in at_every_step(tmp_path / "store", tmp_path, run, run):
        holds(store)
        assert run(store).status == "unchanged"


def test_assignments_are_published_last(begun: Path) -> None:
    """They say which images are done; who reads the tables without a snapshot finds the centroids of every cluster."""
    store = str(begun)
    for change in (update, lambda store: run(store, "cluster.seed=5")):
        with commits_in_order(store) as committed:
            change(store)
        assert committed == [f"clusters/{NAME}/centroids", f"clusters/{NAME}/assignments"]


def test_the_model_is_pointed_at_and_a_damaged_one_is_not_used(begun: Path) -> None:
    store = str(begun)
    tables = ClusterTables.open_existing(store, NAME, {})
    assert tables is not None
    training = tables.training_in(snapshot(tables.log))
    pointer = snapshot(tables.log).pointers[f"clusters/{NAME}"]
    assert pointer.file == f"clusters/{NAME}/model/{training}.npz"
    file = begun / pointer.file
    flip_bit(file, file.stat().st_size // 2)
    with pytest.raises(JobError, match="is damaged"):
        tables.model()
    with pytest.raises(JobError, match="is damaged"):
        update(store)
