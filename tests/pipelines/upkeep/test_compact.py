"""compact: fewer files with the same rows, order, encodings and row groups, whatever else happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changes_in_steps import commits_in_order
from deltalake import DeltaTable
from every_step import each_step
from hand_made import add_failure, add_images, source, write_shard
from small_runs import settings
from stores import sorted_patches, sound
from tables_by_hand import commit_by_hand, made_table
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.errors import RequestError
from pipelines.index import job as index
from pipelines.index import search
from pipelines.results.clusters import training_of
from pipelines.results.matches import MatchTables
from pipelines.store.extraction import Committer
from pipelines.store.parquet import new_file_name
from pipelines.store.schemas import ASSIGNMENTS, IMAGES, MATCHES, PAIRS
from pipelines.store.store import Store
from pipelines.upkeep import compact

RUNS, IMAGES_A_RUN = 7, 5
KEEP_NOTHING = "compact.retention_hours=0"


def small_runs_store(folder: Path, *overrides: str, runs: int = RUNS) -> Store:
    """What many small runs leave: interleaved keys, one file a run and table."""
    store = Store.create(str(folder), settings(*overrides))
    for run in range(runs):
        rows = [source(f"{index:03}/{run}.jpg", index) for index in range(IMAGES_A_RUN)]
        add_images(store, f"20260101T00000{run}Z-00000{run}", rows)
    return store


def every_row(folder: Path) -> list[tuple[object, ...]]:
    query = (
        f"SELECT p.*, i.* EXCLUDE (shard, extracted_at) FROM delta_scan('{folder}/images') i JOIN "
        f"delta_scan('{folder}/patches') p USING (image_id) ORDER BY ALL"
    )
    return duckdb.sql(query.replace("delta_scan", "read_parquet").replace("')", "/*.parquet')")).fetchall()


def live(folder: Path, table: str) -> list[Path]:
    return [folder / table / name for name in DeltaTable(folder / table).get_add_actions().column("path").to_pylist()]


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_rows_stay_and_files_become_one(tmp_path: Path, dtype: str) -> None:
    small_runs_store(tmp_path, f"store.dtype={dtype}")
    before, patches = every_row(tmp_path), sorted_patches(tmp_path)
    options = pq.ParquetFile(live(tmp_path, "patches")[0]).metadata.row_group(0)

    result = compact.run(settings(KEEP_NOTHING), store=str(tmp_path))

    assert result.status == "done" and result.files_before == 2 * RUNS and result.files_after == 2
    assert [len(live(tmp_path, table)) for table in ("images", "patches")] == [1, 1]
    assert len(list((tmp_path / "patches").glob("*.parquet"))) == 1  # nothing is kept of the others
    assert every_row(tmp_path) == before
    assert sorted_patches(tmp_path).equals(patches)
    assert sound(tmp_path).images == RUNS * IMAGES_A_RUN
    merged = pq.ParquetFile(live(tmp_path, "patches")[0])
    ids = merged.read(["image_id"])["image_id"].to_pylist()
    assert ids == sorted(ids)
    for column in range(options.num_columns):
        was, now = options.column(column), merged.metadata.row_group(0).column(column)
        assert (now.path_in_schema, now.compression) == (was.path_in_schema, was.compression)
        assert set(was.encodings) <= set(now.encodings) | {"PLAIN", "RLE"}
        assert now.is_stats_set == was.is_stats_set


def test_what_images_name_is_published_before_them(tmp_path: Path) -> None:
    """Who reads the tables without a snapshot finds the patches of every image."""
    store = small_runs_store(tmp_path, runs=3)
    with commits_in_order(store.uri) as committed:
        compact.run(settings(), store=store.uri)
    assert committed == ["patches", "images"]


def test_row_groups_hold_whole_images_about_64_of_them(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path), settings())
    for run in range(2):
        add_images(store, f"20260101T00000{run}Z-00000{run}", [source(f"{at:03}/{run}.jpg", at) for at in range(80)])
    compact.run(settings(), store=str(tmp_path))
    parquet = pq.ParquetFile(live(tmp_path, "patches")[0])
    groups = [set(parquet.read_row_group(at, ["image_id"])["image_id"].to_pylist()) for at in range(3)]
    assert parquet.num_row_groups == 3 and [len(group) for group in groups] == [64, 64, 32]
    assert not groups[0] & groups[1] and not groups[1] & groups[2]
    log = DeltaTable(tmp_path / "patches").get_add_actions(flatten=True)
    assert (log["min.image_id"][0].as_py(), log["max.image_id"][0].as_py()) == ("000/0.jpg", "079/1.jpg")


def test_large_files_stay_and_groups_do_not_exceed_the_target(tmp_path: Path) -> None:
    store = small_runs_store(tmp_path)
    sizes = [file.size for file in store.patches.files().values()]
    target = 3.5 * np.mean(sizes)  # three of them fit
    result = compact.run(settings(f"compact.target_mb={target / 1e6}"), store=str(tmp_path))
    store.refresh()
    assert len(store.patches.files()) == 3 and result.merged >= 6
    again = compact.run(settings(f"compact.target_mb={1.5 * np.mean(sizes) / 1e6}"), store=str(tmp_path))
    assert again.status == "unchanged"


def test_old_snapshots_are_readable_until_the_retention(tmp_path: Path) -> None:
    small_runs_store(tmp_path)
    version, rows = DeltaTable(tmp_path / "patches").version(), sorted_patches(tmp_path)
    compact.run(settings(), store=str(tmp_path))
    before = DeltaTable(tmp_path / "patches", version=version).to_pyarrow_table().num_rows
    assert before == rows.num_rows
    assert sound(tmp_path).unreferenced_files == 2 * RUNS
    result = compact.run(settings(KEEP_NOTHING), store=str(tmp_path))
    assert result.vacuumed == 2 * RUNS and sound(tmp_path).unreferenced_files == 0
    assert sorted_patches(tmp_path).equals(rows)


def test_extract_goes_on_after_it(tmp_path: Path) -> None:
    store = small_runs_store(tmp_path)
    compact.run(settings(KEEP_NOTHING), store=str(tmp_path))
    reopened = Store.open(str(tmp_path), settings())
    changed = [source("002/3.jpg", 0, version="v2"), source("new.jpg", 1)]
    report = write_shard(reopened, "20260102T000000Z-000000", changed, value=2.0)
    versions = {row["image_id"]: (row["source_size"], row["source_version"]) for row in changed}
    Committer(reopened, "20260102T000000Z-000000", {"002/3.jpg"}).commit([report], versions)
    assert sound(tmp_path).images == RUNS * IMAGES_A_RUN + 1
    assert store.uri == reopened.uri


def test_indices_and_jobs_stay_up_to_date(tmp_path: Path) -> None:
    """It moves rows and the vacuum removes files; both are commits, and neither makes anything older than the store."""
    uri, asked = str(tmp_path), settings(KEEP_NOTHING)
    store = small_runs_store(tmp_path)
    index.run(asked, store=uri, name="images")
    before = store.images.content_version
    assert before == store.images.version == RUNS
    assert compact.run(asked, store=uri).vacuumed
    opened = Store.open(uri, asked)
    assert opened.images.version > RUNS and opened.images.content_version == before
    assert index.run(asked, store=uri, name="images").status == "unchanged"
    found = search.run(asked, store=uri, name="images", image="002/3.jpg", top=1)
    assert len(found.results) == 1
    add_images(opened, "20260102T000000Z-000000", [source("new.jpg", 0)])
    opened.refresh()
    assert opened.images.content_version == opened.images.version > before
    with pytest.raises(RequestError, match="older than the store"):
        search.run(asked, store=uri, name="images", image="002/3.jpg", top=1)


def test_a_run_that_commits_meanwhile_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run replaces an image while its files are being merged: its rows stand, compact leaves the group."""
    small_runs_store(tmp_path)
    merge = compact.merge_files
    calls = []

    def merging(*args: object, **options: object) -> object:
        if not calls:
            other = Store.open(str(tmp_path), settings())
            changed = [source("002/3.jpg", 0, version="v2")]
            report = write_shard(other, "20260102T000000Z-000000", changed, value=2.0)
            Committer(other, "20260102T000000Z-000000", {"002/3.jpg"}).commit([report], {"002/3.jpg": (10, "v2")})
        calls.append(args)
        return merge(*args, **options)

    monkeypatch.setattr(compact, "merge_files", merging)
    result = compact.run(settings(), store=str(tmp_path))
    assert result.conflicts >= 1
    assert sound(tmp_path).images == RUNS * IMAGES_A_RUN
    images = duckdb.sql(
        f"SELECT source_version FROM read_parquet({[str(p) for p in live(tmp_path, 'images')]}) "
        "WHERE image_id = '002/3.jpg'"
    ).fetchall()
    assert images == [("v2",)]
    monkeypatch.undo()
    assert compact.run(settings(KEEP_NOTHING), store=str(tmp_path)).conflicts == 0
    assert sound(tmp_path).unreferenced_files == 0 and len(live(tmp_path, "patches")) == 1


def test_a_signal_at_any_step_ends_it_with_what_was_merged(tmp_path: Path) -> None:
    """Ctrl-C, and the SIGTERM of a scheduler: every row stays, no file is left over, and the result counts what the
    store shows."""
    small_runs_store(tmp_path / "begun", runs=2)
    before = every_row(tmp_path / "begun")
    merged = set[int]()
    for step in each_step(10):
        folder = Path(shutil.copytree(tmp_path / "begun", tmp_path / "store"))
        kind = signal.SIGTERM if step.number % 2 else signal.SIGINT
        with step.disturbed(partial(signal.raise_signal, kind)):
            if step.number == 0:  # before the report says that it has begun
                with pytest.raises(KeyboardInterrupt):
                    compact.run(settings(KEEP_NOTHING), store=str(folder))
            else:
                result = compact.run(settings(KEEP_NOTHING), store=str(folder))
        if step.number and result.exit_code:
            assert (result.status, result.exit_code) == ("interrupted", 130), f"{step}"
            files = [len(live(folder, table)) for table in ("patches", "images")]
            assert files == ([1, 1] if result.merged else [2, 2]), f"{step}"
            replaced = 4 if result.merged and not result.vacuumed else 0
            assert sound(folder).unreferenced_files == replaced, f"{step}"
            assert compact.run(settings(KEEP_NOTHING), store=str(folder)).exit_code == 0
            assert every_row(folder) == before and sound(folder).unreferenced_files == 0
            merged.add(result.merged)
        shutil.rmtree(folder)
    assert merged == {0, 4}, "some signals came before the merge and some after it"


def test_rows_that_come_to_name_a_file_while_it_is_merged_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file of images that compact has not seen."""
    store = small_runs_store(tmp_path, runs=2)
    merge = compact.merge_files
    shard = min(store.patches.files())
    calls = []

    def merging(*args: object, **options: object) -> object:
        if not calls:
            other = Store.open(str(tmp_path), settings())
            rows = other.images.read_file(min(other.images.files())).slice(0, 1)
            rows = rows.set_column(rows.schema.get_field_index("image_id"), "image_id", pa.array(["003/x.jpg"]))
            rows = rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array([shard]))
            commit_by_hand(other.images, [other.images.write_file(new_file_name("r"), rows.cast(IMAGES))], [], "r")
        calls.append(args)
        return merge(*args, **options)

    monkeypatch.setattr(compact, "merge_files", merging)
    assert compact.run(settings(), store=str(tmp_path)).conflicts == 1
    store.refresh()
    assert shard in store.patches.files()


def test_what_was_killed_before_there_were_transactions_is_neither_merged_nor_swept(tmp_path: Path) -> None:
    """Patches that no image names, and patches that images name and the log lost, wait for extract."""
    store = small_runs_store(tmp_path)
    before = every_row(tmp_path)
    orphan = write_shard(store, "20260103T000000Z-000000", [source("new.jpg")]).patches
    lost, *_ = store.patches.files().values()
    assert orphan
    commit_by_hand(store.patches, [orphan], [lost.path], "20260103T000000Z-000000")

    compact.run(settings(KEEP_NOTHING), store=str(tmp_path))
    compact.run(settings(KEEP_NOTHING), store=str(tmp_path))

    store.refresh()
    assert orphan.path in store.patches.files() and store.patches.has_file(lost.path)
    found = store.repair("20260104T000000Z-000000")
    assert (found["orphans_removed"], found["shards_restored"], found["shards_lost"]) == (1, 1, 0)
    assert sound(tmp_path).images == RUNS * IMAGES_A_RUN
    compact.run(settings(KEEP_NOTHING), store=str(tmp_path))
    assert every_row(tmp_path) == before


def test_nothing_outside_the_tables_is_swept(tmp_path: Path) -> None:
    """Neither what jobs keep beside tables nor what others keep in the folder, however old."""
    store = small_runs_store(tmp_path)
    patches = sorted_patches(tmp_path)
    folders = ["", "index/photos", "clusters/words", "projection", "models", "weights", "runs", "parts/x", "mine"]
    names = ["a.parquet", "model-1.npz", "manifest-1.json", "a.faiss", "settings.json", "w.safetensors", "x.partial"]
    kept = [tmp_path / folder / name for folder in folders for name in names]
    made_table(str(tmp_path / "mine"), IMAGES)  # somebody's own
    kept += [tmp_path / "images" / "notes.txt", tmp_path / "clusters" / "words" / "assignments.parquet"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    leftovers = [tmp_path / "patches" / new_file_name("20260101T000000Z-000009")]
    leftovers += [tmp_path / "images" / "_delta_log" / f"{99:020}.json#1", Path(store.log.folder) / "1.json.x.partial"]
    for path in leftovers:
        path.write_bytes(b"x")
    every = [Path(at) / name for at, _, names in os.walk(tmp_path) for name in names]
    for path in every:
        os.utime(path, (time.time() - 30 * 24 * 3600,) * 2)
    assert compact.run(settings("compact.retention_hours=24"), store=str(tmp_path)).vacuumed == len(leftovers)
    assert not any(path.exists() for path in leftovers)
    for path in Path(store.log.folder).iterdir():  # a month later
        os.utime(path, (time.time() - 30 * 24 * 3600,) * 2)

    result = compact.run(settings("compact.retention_hours=24"), store=str(tmp_path))

    gone = [path for path in every if not path.exists() and path.parent != Path(store.log.folder)]
    swept = {path for path in gone if path.parent.name != "_delta_log"} - set(leftovers)
    assert swept and all(path.parent.name in ("images", "patches") and path.suffix == ".parquet" for path in swept)
    assert result.vacuumed == len(swept)
    assert all(path.exists() for path in kept)
    assert sorted_patches(tmp_path).equals(patches)


def test_stores_without_patches_and_failures(tmp_path: Path) -> None:
    store = small_runs_store(tmp_path, "store.patches=none")
    for at in range(3):
        add_failure(store, f"20260101T00010{at}Z-00010{at}", f"bad-{at}.jpg")
    compact.run(settings(KEEP_NOTHING), store=str(tmp_path))
    assert len(live(tmp_path, "images")) == 1 and len(live(tmp_path, "failures")) == 1
    assert sound(tmp_path).failures == 3


def test_the_command(tmp_path: Path) -> None:
    small_runs_store(tmp_path / "store")
    runner = CliRunner()
    planned = runner.invoke(app, ["compact", str(tmp_path / "store"), "--dry-run", "--json"])
    assert json.loads(planned.stdout)["merged"] == 2 * RUNS
    assert len(live(tmp_path / "store", "patches")) == RUNS
    done = runner.invoke(app, ["compact", str(tmp_path / "store")])
    assert done.exit_code == 0 and "14 files merged into 2" in done.stdout
    missing = runner.invoke(app, ["compact", str(tmp_path / "nothing")])
    assert missing.exit_code == 2 and "There is no store" in missing.stderr


def test_matches_and_the_pairs_that_name_them(tmp_path: Path) -> None:
    store = small_runs_store(tmp_path, runs=1)
    tables = MatchTables.open_or_make(store.uri, "nearest", {})
    for run in range(3):
        run_id, name = f"20260102T00000{run}Z-00000{run}", new_file_name(f"20260102T00000{run}Z-00000{run}")
        ids = [(f"{at:03}/0.jpg", f"{at + run + 1:03}/0.jpg") for at in range(IMAGES_A_RUN - run - 1)]
        place = dict.fromkeys(("row_a", "col_a", "row_b", "col_b"), 0) | dict.fromkeys(
            ("y_a", "x_a", "y_b", "x_b"), 1.0
        )
        matches = [
            {"image_a": a, "image_b": b, **place, "similarity": 0.5, "saliency": 0.5, "rank": rank}
            for a, b in ids
            for rank in range(2)
        ]
        about = {"score": 0.5, "source": "all", "mutual": 2, "kept": 2, "shard": name}
        about |= dict.fromkeys(("run_id_a", "run_id_b"), "20260101T000000Z-000000")
        pairs = [{"image_a": a, "image_b": b, **about} for a, b in ids]
        written = tables.matches.write_file(name, pa.Table.from_pylist(matches, schema=MATCHES))
        commit_by_hand(tables.matches, [written], [], run_id)
        commit_by_hand(
            tables.pairs, [tables.pairs.write_file(name, pa.Table.from_pylist(pairs, schema=PAIRS))], [], run_id
        )
    sound(tmp_path)
    folder = tmp_path / "matches" / "nearest"
    before = duckdb.sql(f"FROM '{folder}/matches/*.parquet' ORDER BY ALL").fetchall()

    compact.run(settings(KEEP_NOTHING), store=str(tmp_path))

    assert [len(live(folder, table)) for table in ("pairs", "matches")] == [1, 1]
    assert duckdb.sql(f"FROM '{folder}/matches/*.parquet' ORDER BY ALL").fetchall() == before
    shards = duckdb.sql(f"SELECT DISTINCT shard FROM '{folder}/pairs/*.parquet'").fetchall()
    assert shards == [(live(folder, "matches")[0].name,)]
    sound(tmp_path)


def test_files_of_two_trainings_stay_apart_and_say_which_they_are_of(tmp_path: Path) -> None:
    table = made_table(str(tmp_path / "assignments"), ASSIGNMENTS)
    trainings = ("20260101T000000Z-aaaaaa", "20260102T000000Z-bbbbbb")
    for number in range(4):
        row = {"image_id": f"{number}.jpg", "row": 0, "col": 0, "cluster_id": 1, "distance": 0.5, "saliency": 0.5}
        rows = pa.Table.from_pylist([row | {"run_id": "20260101T000000Z-000000"}], schema=ASSIGNMENTS)
        commit_by_hand(table, [table.write_file(new_file_name(trainings[number % 2]), rows)], [], trainings[number % 2])
    linked = compact.LinkedTables(table, run_in_names=True)
    groups = linked.groups(1_000_000)
    assert [{training_of(file.path) for file in group} for group in groups] == [{trainings[0]}, {trainings[1]}]
    assert [training_of(linked.new_name(group, "20260103T000000Z-cccccc")) for group in groups] == list(trainings)


def test_commits_of_more_than_a_month_ago_go_once_a_checkpoint_stands_for_them(tmp_path: Path) -> None:
    store = small_runs_store(tmp_path / "store", runs=25)
    log = tmp_path / "store" / "images" / "_delta_log"
    days = 24 * 3600
    for at, commit in enumerate(sorted(log.glob("*.json"))):
        age = 40 * days if at < 15 else 20 * days
        os.utime(commit, (time.time() - age,) * 2)
        if (checkpoint := commit.with_suffix(".checkpoint.parquet")).exists():
            os.utime(checkpoint, (time.time() - age,) * 2)
    rows, before = every_row(tmp_path / "store"), store.images.content_identity
    compact.run(settings("compact.target_mb=0.000001"), store=store.uri)
    commits = sorted(int(path.stem) for path in log.glob("*.json"))
    oldest = int(sorted(log.glob("*.checkpoint.parquet"))[0].name.partition(".")[0])
    assert 0 < oldest < 15 and commits == list(range(oldest, 26))
    for version in commits:
        assert DeltaTable(store.images.uri, version=version).version() == version
    assert every_row(tmp_path / "store") == rows
    assert Store.open(store.uri, settings()).images.content_identity == before
    sound(tmp_path / "store")
