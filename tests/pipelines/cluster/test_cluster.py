"""dinoray cluster: what its tables say, against a float64 calculation and SQL; spread, cache, kills and updates."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable
from documents import python_of_section
from hand_made import add_described, described
from local_clusters import use_local_workers
from s3_server import BUCKET, S3Server
from small_runs import as_options, settings
from tables_by_hand import commit_by_hand, made_table
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.cluster import actors
from pipelines.cluster import job as cluster
from pipelines.cluster import training as cluster_training
from pipelines.errors import JobError, RequestError
from pipelines.results.cluster_models import checkpoint_uri, read_model
from pipelines.results.clusters import ClusterTables, training_of
from pipelines.running.layout import Layout
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.store.extraction import drop_images
from pipelines.store.parquet import new_file_name
from pipelines.store.schemas import CENTROIDS
from pipelines.store.store import Store
from pipelines.upkeep import verify

DIMENSION = 16
CENTRES = 12


def patches_around(centres: np.ndarray, seed: int, grid: tuple[int, int] = (6, 8)) -> np.ndarray:
    """A descriptor map whose patches lie near random ones of `centres`, at different lengths."""
    generator = np.random.default_rng(seed)
    cells = centres[generator.integers(0, len(centres), grid)]
    noisy = cells + 0.25 * generator.standard_normal((*grid, centres.shape[1]))
    return noisy * generator.uniform(0.5, 4, (*grid, 1))


def centres(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((CENTRES, DIMENSION))


def add(store: Store, run: int, images: range, of: np.ndarray | None = None, version: str = "v1") -> None:
    of = centres() if of is None else of
    made = {f"{number:03d}.jpg": described(patches_around(of, number + 1000 * run)) for number in images}
    add_described(store, f"2020010{run}T000000Z-00000{run}", made, version)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_workers(monkeypatch)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Forty images in two shards."""
    made = Store.create(str(tmp_path / "store"), settings())
    add(made, 1, range(25))
    add(made, 2, range(25, 40))
    return made


def run(store: Store, name: str = "words", *overrides: str, **options: Any) -> cluster.Result:
    return cluster.run(settings("cluster.k=12", *overrides), store=store.uri, name=name, **options)


def centroid_table(store: Store, name: str = "words") -> np.ndarray:
    rows = DeltaTable(f"{store.uri}/clusters/{name}/centroids").to_pyarrow_table().sort_by("cluster_id")
    assert rows["cluster_id"].to_pylist() == list(range(len(rows)))
    return np.stack(rows["centroid"].to_numpy())


def assigned(store: Store, name: str = "words") -> dict[tuple[str, int, int], tuple[int, float]]:
    """(image_id, row, col) -> (cluster_id, distance)."""
    rows = DeltaTable(f"{store.uri}/clusters/{name}/assignments").to_pyarrow_table().to_pylist()
    found = {(row["image_id"], row["row"], row["col"]): (row["cluster_id"], row["distance"]) for row in rows}
    assert len(found) == len(rows), "a patch is assigned twice"
    return found


def stored_vectors(store: Store) -> dict[tuple[str, int, int], np.ndarray]:
    rows = DeltaTable(f"{store.uri}/patches").to_pyarrow_table().to_pylist()
    return {(row["image_id"], row["row"], row["col"]): np.array(row["descriptor"], np.float64) for row in rows}


def check_tables(store: Store, name: str = "words", metric: str = "cosine") -> None:
    """Every patch lies in its nearest cluster, by a float64 loop; sizes, inertia and votes are what SQL counts."""
    found, vectors, centroids = assigned(store, name), stored_vectors(store), centroid_table(store, name)
    assert found.keys() == vectors.keys()
    for key, vector in vectors.items():
        if metric == "cosine":
            distances = 1 - centroids @ vector / np.linalg.norm(vector) / np.linalg.norm(centroids, axis=1)
        else:
            distances = np.linalg.norm(centroids - vector, axis=1)
        label, distance = found[key]
        assert distance == pytest.approx(distances[label], abs=1e-5)
        assert distances[label] <= distances.min() + 1e-5
    folder = f"{store.uri}/clusters/{name}"
    files = {table: DeltaTable(f"{folder}/{table}").file_uris() for table in ("centroids", "assignments")}
    power = 1 if metric == "cosine" else 2
    wrong = duckdb.sql(
        f"""
        with votes as (
            select cluster_id, count(*) filter (mean > 0.065) as votes
            from (select image_id, cluster_id, avg(saliency::DOUBLE) as mean
                  from read_parquet({files["assignments"]}) group by all) group by cluster_id
        ), counted as (
            select cluster_id, count(*) as size, sum(pow(distance::DOUBLE, {power})) as inertia
            from read_parquet({files["assignments"]}) group by cluster_id
        )
        select c.cluster_id, c.size, counted.size, c.salient_votes, votes.votes, c.inertia, counted.inertia
        from read_parquet({files["centroids"]}) c
             left join counted using (cluster_id) left join votes using (cluster_id)
        where c.size != coalesce(counted.size, 0) or c.salient_votes != coalesce(votes.votes, 0)
           or abs(c.inertia - coalesce(counted.inertia, 0)) > 1e-6 * (1 + c.inertia)
        """
    ).fetchall()
    assert wrong == []


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_every_patch_is_in_its_nearest_cluster(store: Store, here: None, metric: str) -> None:
    result = run(store, "words", f"cluster.metric={metric}")
    assert (result.status, result.k, result.vectors, result.images) == ("done", 12, 40 * 48, 40)
    assert 2 <= result.iterations < 50  # until a pass gains nothing, which takes one to compare with
    check_tables(store, metric=metric)


def test_k_means_finds_the_clusters_that_are_there(store: Store, here: None) -> None:
    """Twelve directions, well apart: the centroids are the means of what was drawn around each."""
    run(store)
    directions = centres() / np.linalg.norm(centres(), axis=1, keepdims=True)
    cosine = centroid_table(store) @ directions.T
    assert sorted(cosine.argmax(axis=1)) == list(range(CENTRES))
    assert cosine.max(axis=1).min() > 0.99


def test_the_spread_over_workers_and_the_cache_do_not_matter(store: Store, ray: None) -> None:
    expected = None
    for name, overrides in {
        "one": ["run.workers=1"],
        "four": ["run.workers=4"],
        "two-uncached": ["run.workers=2", "cluster.cache_gb=0.00000001"],
    }.items():
        result = run(store, name, *overrides)
        assert result.held_share == (0 if "uncached" in name else 1)
        found = centroid_table(store, name)
        expected = found if expected is None else expected
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert assigned(store, "one").keys() == assigned(store, "two-uncached").keys()


def test_a_second_run_has_nothing_to_do_until_images_change(store: Store, here: None) -> None:
    first = run(store)
    versions = [DeltaTable(f"{store.uri}/clusters/words/{table}").version() for table in ("centroids", "assignments")]
    again = run(store)
    assert (again.status, again.k, again.vectors) == ("unchanged", first.k, first.vectors)
    assert versions == [
        DeltaTable(f"{store.uri}/clusters/words/{table}").version() for table in ("centroids", "assignments")
    ]
    add(store, 3, range(40, 44))
    changed = run(store)
    assert changed.status == "done"
    assert "The clusters words were trained again, since the images have changed." in changed.messages
    check_tables(store)
    other = run(store, "words", "cluster.seed=3")
    told = "The clusters words were trained again, since other settings were given (cluster.seed was 0)."
    assert told in other.messages


def test_an_interrupted_training_continues_where_it_was(
    store: Store, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_training, "ITERATIONS_ON_SAMPLE", 0)  # so that there is something left to do
    overrides = ["cluster.iterations=8", "cluster.tolerance=0", "cluster.k=100"]
    run(store, "whole", *overrides)

    def stop(line: object, text: str) -> None:
        if "iteration 3 " in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.running.progress.StatusLine.show", stop)
        stopped = run(store, "words", *overrides)
    assert (stopped.status, stopped.exit_code) == ("interrupted", 130)
    left = read_model(checkpoint_uri(f"{store.uri}/clusters/words"), {})
    assert left is not None and left.progress.iteration == 3
    passes: list[int] = []
    sums = cluster_training.Workers.sums
    monkeypatch.setattr(cluster_training.Workers, "sums", lambda self, *args: (passes.append(1), sums(self, *args))[1])
    result = run(store, "words", *overrides)
    assert (result.resumed_from, result.iterations, len(passes)) == (3, 8, 5)
    np.testing.assert_allclose(centroid_table(store), centroid_table(store, "whole"), atol=1e-9)
    assert read_model(checkpoint_uri(f"{store.uri}/clusters/words"), {}) is None


def test_a_checkpoint_of_other_settings_or_images_is_not_continued(
    store: Store, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(line: object, text: str) -> None:
        if "iteration 1 " in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.running.progress.StatusLine.show", stop)
        run(store)
    assert run(store, "words", "cluster.seed=5").resumed_from == 0


def test_update_assigns_what_is_new_and_keeps_the_rest(store: Store, ray: None) -> None:
    run(store)
    before, centroids = assigned(store), centroid_table(store)
    add(store, 3, range(40, 45))  # new
    add(store, 4, range(3, 5), version="v2")  # changed
    drop_images(store, ["010.jpg"], "20200105T000000Z-000005")
    result = run(store, update=True)
    assert (result.status, result.what, result.added, result.removed) == ("done", "update", 7, 3)
    np.testing.assert_array_equal(centroid_table(store), centroids)
    store.refresh()
    check_tables(store)
    after = assigned(store)
    untouched = [key for key in before if key[0] not in {"003.jpg", "004.jpg", "010.jpg"}]
    assert {key: before[key] for key in untouched} == {key: after[key] for key in untouched}
    assert result.drift == pytest.approx(1, abs=0.1)
    assert run(store, update=True).status == "unchanged"


def test_update_says_that_the_data_has_drifted(store: Store, here: None) -> None:
    run(store)
    add(store, 3, range(40, 60), of=centres(seed=9))
    result = run(store, update=True)
    assert result.drift is not None and result.drift > 2
    assert any("farther from their centroids" in message and "20 new images" in message for message in result.messages)


def test_update_keeps_the_settings_of_the_training(store: Store, here: None) -> None:
    run(store, "words", "cluster.metric=euclidean")
    add(store, 3, range(40, 42))
    assert cluster.run(settings(), store=store.uri, name="words", update=True).added == 2
    check_tables(store, metric="euclidean")
    with pytest.raises(RequestError, match=r"cluster\.k: trained with 12, requested 13"):
        run(store, "words", "cluster.k=13", update=True)


def test_update_without_clusters_trains(store: Store, here: None) -> None:
    assert run(store, update=True).what == "train"
    check_tables(store)


@pytest.mark.parametrize("swapped", [False, True], ids=["more patches", "as many patches as before"])
def test_what_an_older_dinoray_left_between_its_two_commits_is_completed(
    store: Store, here: None, swapped: bool
) -> None:
    """Assignments came and the centroids with their counts did not: sizes are wrong, also where their sum is right."""
    run(store)
    tables = ClusterTables.open_existing(store.uri, "words", {})
    assert tables is not None
    sizes = tables.centroids.read(list(CENTROIDS.names))
    wrong = pc.subtract(sizes["size"], pa.array([1, -1, *[0] * 10] if swapped else [1] * 12))
    name = new_file_name(training_of(next(iter(tables.centroids.files()))))
    centroids = tables.centroids.write_file(name, sizes.set_column(1, "size", wrong))
    # no transaction has changed anything yet
    shutil.rmtree(Path(store.uri, "transactions"))
    store.refresh()
    kept = [store.images, store.patches, store.failures, tables.assignments]
    for table, files in [(table, list(table.files().values())) for table in kept] + [(tables.centroids, [centroids])]:
        shutil.rmtree(Path(table.uri, "_delta_log"))
        commit_by_hand(made_table(table.uri, table.schema), files, [], "older")
    store = Store.open(store.uri, store.config)
    assert verified(store) != []
    result = run(store, update=True)
    assert (result.status, result.added) == ("done", 0)
    assert any("counted again" in message for message in result.messages)
    check_tables(store)
    assert run(store, update=True).status == "unchanged"


def test_a_tree_of_clusters(store: Store, here: None) -> None:
    result = run(store, "tree", "cluster.k=40", "cluster.levels=2")
    assert result.k == 40
    centroids = centroid_table(store, "tree")
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    exact = sum((1 - centroids @ vector / np.linalg.norm(vector)).min() for vector in stored_vectors(store).values())
    found = sum(distance for _, distance in assigned(store, "tree").values())
    assert exact <= found + 1e-3
    assert found <= 1.1 * exact  # a tree looks into one branch only
    flat = run(store, "flat", "cluster.k=12")
    assert flat.mean_distance is not None and found / len(stored_vectors(store)) < flat.mean_distance


def test_elbow_chooses_k(store: Store, here: None) -> None:
    result = run(store, "words", "cluster.k=40", "cluster.elbow=0.9")
    assert 8 <= result.k <= 16
    assert any(message.startswith(f"k = {result.k}") for message in result.messages)
    check_tables(store)


def test_elbow_among_few_images_ends_with_as_many_clusters_as_there_are(tmp_path: Path, here: None) -> None:
    apart = [np.full((2, 2, DIMENSION), row) for row in np.eye(3, DIMENSION)]
    store = small(tmp_path, apart)
    result = run(store, "scenes", "cluster.of=embeddings", "cluster.elbow=0.9")
    assert result.k == 3
    assert result.messages == ["k = 3, the most there can be: no smaller one met the elbow 0.9."]


def test_salient_patches_train_and_all_are_assigned(store: Store, here: None) -> None:
    result = run(store, "words", "cluster.salient_only=true")
    saliency = DeltaTable(f"{store.uri}/patches").to_pyarrow_table()["saliency"].to_numpy()
    assert result.trained_on == int((saliency > 0.065).sum()) < result.vectors == len(saliency)
    check_tables(store)


def test_training_on_a_sample(store: Store, here: None) -> None:
    result = run(store, "words", "cluster.sample=800")
    assert (result.trained_on, result.vectors) == (800, 1920)
    check_tables(store)


def test_images_are_clustered_by_their_embeddings(store: Store, here: None) -> None:
    result = run(store, "scenes", "cluster.of=embeddings", "cluster.k=3")
    rows = DeltaTable(f"{store.uri}/clusters/scenes/assignments").to_pyarrow_table()
    assert (result.vectors, len(rows), rows["row"].null_count) == (40, 40, 40)
    centroids = centroid_table(store, "scenes")
    images = DeltaTable(f"{store.uri}/images").to_pyarrow_table().to_pylist()
    embeddings = {row["image_id"]: np.array(row["embedding"], np.float64) for row in images}
    for row in rows.to_pylist():
        vector = embeddings[row["image_id"]]
        cosine = centroids @ vector / np.linalg.norm(vector)
        assert cosine[row["cluster_id"]] == pytest.approx(cosine.max(), abs=1e-6)
    add(store, 3, range(40, 42))
    assert cluster.run(settings(), store=store.uri, name="scenes", update=True).added == 2


def small(tmp_path: Path, descriptors: list[np.ndarray], config: Config | None = None) -> Store:
    made = Store.create(str(tmp_path / "small"), config or settings())
    add_described(made, "20200101T000000Z-000001", {f"{at}.jpg": described(one) for at, one in enumerate(descriptors)})
    return made


def test_more_clusters_than_patches(tmp_path: Path, here: None) -> None:
    store = small(tmp_path, [patches_around(centres(), 1, (2, 3))])
    result = run(store, "words", "cluster.k=50")
    assert (result.k, result.vectors, result.empty) == (6, 6, 0)
    assert any(
        "50 clusters were asked for, and 6 were made: there are no more distinct" in message
        for message in result.messages
    )
    check_tables(store)


def test_patches_that_are_all_the_same(tmp_path: Path, here: None) -> None:
    store = small(tmp_path, [np.ones((3, 3, DIMENSION)), np.ones((2, 2, DIMENSION))])
    result = run(store)
    assert (result.k, result.vectors, result.largest) == (1, 13, 13)
    check_tables(store)


def test_vectors_of_zeros_are_assigned_somewhere(tmp_path: Path, here: None) -> None:
    cells = patches_around(centres(), 1)
    cells[0, :3] = 0
    store = small(tmp_path, [cells])
    run(store, "words", "cluster.k=4")
    distances = [distance for (_, row, col), (_, distance) in assigned(store).items() if row == 0 and col < 3]
    assert distances == [1, 1, 1]


def test_wrong_requests_are_one_sentence(store: Store, tmp_path: Path) -> None:
    empty = Store.create(str(tmp_path / "empty"), settings())
    with pytest.raises(RequestError, match="has no images yet"):
        run(empty)
    with pytest.raises(
        RequestError, match=r"cluster\.descriptor is descriptor_key9, but the store's patches have descriptor"
    ):
        run(store, "words", "cluster.descriptor=descriptor_key9")
    with pytest.raises(RequestError, match="NAME is 'a/b'"):
        run(store, "a/b")
    with pytest.raises(RequestError, match="elbow chooses a small k"):
        run(store, "words", "cluster.elbow=0.9", "cluster.levels=2")
    with pytest.raises(RequestError, match="There is no store"):
        cluster.run(settings(), store=str(tmp_path / "nowhere"), name="words")
    without = Store.create(str(tmp_path / "without"), settings("features.saliency=false", "features.embedding=false"))
    bare = dataclasses.replace(described(np.ones((2, 2, DIMENSION))), saliency=None, embedding=None)
    add_described(without, "20200101T000000Z-000001", {"a.jpg": bare})
    with pytest.raises(RequestError, match="salient_only needs saliency"):
        run(without, "words", "cluster.salient_only=true")
    with pytest.raises(RequestError, match="has no embeddings"):
        run(without, "words", "cluster.of=embeddings")


@pytest.mark.parametrize(
    ("resources", "overrides", "expected"),
    [
        ({"CPU": 2}, [], Layout("cpu", 2, 1, 0)),
        ({"CPU": 64}, [], Layout("cpu", 16, 4, 0)),
        ({"CPU": 2}, ["run.workers=5"], Layout("cpu", 5, 0.4, 0)),
        ({"CPU": 16, "GPU": 2}, [], Layout("cuda", 2, 4, 1)),
        ({"CPU": 16, "GPU": 2}, ["model.device=cpu"], Layout("cpu", 4, 4, 0)),
    ],
)
def test_workers_fit_the_cluster(resources: dict[str, float], overrides: list[str], expected: Layout) -> None:
    assert actors.plan_cluster_workers(resources, load_config([], overrides)) == expected


def test_workers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match=r"3 workers with 1 CPU and 0 GPUs each .* has 2 CPUs"):
        actors.plan_cluster_workers({"CPU": 2}, load_config([], ["run.workers=3", "run.cpus_per_worker=1"]))
    with pytest.raises(RequestError, match="has no GPU"):
        actors.plan_cluster_workers({"CPU": 2}, load_config([], ["model.device=cuda"]))


def test_nothing_salient_to_train_on(tmp_path: Path, here: None) -> None:
    store = Store.create(str(tmp_path / "dull"), settings())
    dull = described(np.ones((2, 2, DIMENSION)), saliency=np.zeros((2, 2)))
    add_described(store, "20200101T000000Z-000001", {"a.jpg": dull})
    with pytest.raises(JobError, match="none of 4 patches is more salient"):
        run(store, "words", "cluster.salient_only=true")


def verified(store: Store) -> list[str]:
    return verify.run(settings(), store=store.uri).problems


def test_verify_names_what_is_wrong(store: Store, here: None) -> None:
    run(store)
    assert verified(store) == []
    tables = ClusterTables.open_existing(store.uri, "words", {})
    assert tables is not None
    (path,) = list(tables.centroids.files())[:1]
    rows = tables.centroids.read_file(path)
    wrong = rows.set_column(1, rows.schema.field("size"), pc.add(rows["size"], 1))
    training = path[len("part-") : -len("-0123456789ab.parquet")]
    commit_by_hand(tables.centroids, [tables.centroids.write_file(new_file_name(training), wrong)], [path], training)
    assert len(verified(store)) == 12 and "cluster 0 has" in verified(store)[0]

    run(store, "twice")
    tables = ClusterTables.open_existing(store.uri, "twice", {})
    assert tables is not None
    path = next(iter(tables.assignments.files()))
    training = path[len("part-") : -len("-0123456789ab.parquet")]
    again = tables.assignments.write_file(new_file_name(training), tables.assignments.read_file(path).slice(0, 48))
    commit_by_hand(tables.assignments, [again], [], training)
    assert any("clusters/twice: assignments: 000.jpg lies in" in problem for problem in verified(store))

    run(store, "bare")
    for file in (Path(store.uri) / "clusters" / "bare" / "model").iterdir():
        file.unlink()
    assert any(problem.startswith("clusters/bare: ") and "is gone" in problem for problem in verified(store))


def test_dry_run_writes_nothing(store: Store) -> None:
    result = run(store, dry_run=True)
    assert (result.status, result.vectors, result.k) == ("dry_run", 1920, 12)
    assert not (Path(store.uri) / "clusters").exists()


def test_the_command_says_what_was_done(store: Store, here: None) -> None:
    def cli(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["cluster", store.uri, "words", *as_options(), *arguments])

    planned = cli("--k", "5", "--dry-run")
    assert "1,920 patches of 40 images to 5 clusters" in planned.stdout and "Nothing was written" in planned.stdout
    trained = cli("--k", "5")
    assert trained.exit_code == 0, trained.stderr
    assert "1,920 patches in 5 clusters" in trained.stdout
    assert f"{store.uri}/clusters/words/centroids" in trained.stdout
    assert "up to date" in cli("--k", "5").stdout
    add(store, 3, range(40, 42))
    updated = json.loads(cli("--update", "--json").stdout)
    assert (updated["added"], updated["k"], updated["vectors"]) == (2, 5, 2016)
    listed = CliRunner().invoke(app, ["stats", store.uri], env={"COLUMNS": "200"})
    assert "clusters/words" in listed.stdout and "5 clusters, 2,016 assignments" in listed.stdout
    refused = cli("--update", "--k", "6")
    assert refused.exit_code == 2
    assert refused.stderr == (
        "dinoray: The clusters words were trained with other settings (cluster.k: trained with 5, requested 6), and an "
        "update keeps its centroids: leave these settings out, give another NAME, or train again without --update.\n"
    )
    chosen = json.loads(cli("--elbow", "--k", "9", "--json").stdout)
    assert 1 < chosen["k"] <= 9


def test_the_documented_query_runs_as_shown(store: Store, tmp_path: Path, here: None) -> None:
    run(store)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "store").symlink_to(store.uri)
    query = python_of_section("docs/cluster.md", "A query")
    done = subprocess.run([sys.executable, "-c", query], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "patches" in done.stdout, done.stderr


def test_a_store_in_a_bucket(s3: S3Server, here: None) -> None:
    options = [f"storage.options.{key}={value}" for key, value in s3.options.items()]
    store = Store.create(f"s3://{BUCKET}/cluster", settings(*options))
    add(store, 1, range(5))
    assert run(store, "words", *options).vectors == 240
    add(store, 2, range(5, 7))
    result = run(store, "words", *options, update=True)
    assert (result.added, result.vectors) == (2, 336)
    assert verify.run(settings(*options), store=store.uri).problems == []


@pytest.mark.slow
def test_a_training_that_is_killed_continues_from_its_last_iteration(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path / "store"), settings())
    noise = np.random.default_rng(0)
    images = {f"{at:03d}.jpg": described(noise.standard_normal((40, 40, DIMENSION))) for at in range(100)}
    add_described(store, "20200101T000000Z-000001", images)
    checkpoint = Path(store.uri) / "clusters" / "words" / "model" / "checkpoint.npz"
    overrides = ["run.workers=2", "cluster.k=300", "cluster.tolerance=0", "cluster.iterations=25"]

    def command(name: str) -> list[str]:
        return [str(Path(sys.executable).with_name("dinoray")), "cluster", store.uri, name, *as_options(*overrides)]

    process = subprocess.Popen(command("words"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (checkpoint.exists() and iterations(checkpoint) >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = iterations(checkpoint)
    again = subprocess.run([*command("words"), "--json"], capture_output=True, text=True, timeout=300)
    result = json.loads(again.stdout)
    assert (result["status"], result["resumed_from"]) == ("done", done)
    subprocess.run(command("whole"), check=True, timeout=300)
    np.testing.assert_allclose(centroid_table(store), centroid_table(store, "whole"), atol=1e-6)
    assert assigned(store).keys() == assigned(store, "whole").keys()
    assert verified(store) == []


def iterations(checkpoint: Path) -> int:
    model = read_model(str(checkpoint), {})
    return 0 if model is None else len(model.progress.objectives)


def test_another_kind_of_clustering_is_not_replaced(store: Store, here: None) -> None:
    """Images clustered under the name of clusters of patches do not replace them."""
    run(store)
    with pytest.raises(
        RequestError, match=r"clusters words are of patches, and embeddings were requested: give another"
    ):
        run(store, "words", "cluster.of=embeddings")
    assert run(store).status == "unchanged"
