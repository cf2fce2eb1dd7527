"""An index over many updates: segments, merges, removals, kills and competitors, for every kind, as whole jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_server import BUCKET, S3Server
from small_runs import settings
from storage_steps import at_step

from benchmarks.embedded import add_embeddings
from dino_ops.nearest import MIN_TRAINING_VECTORS, unit
from pipelines.index import job as index
from pipelines.index import search
from pipelines.index import update as index_update
from pipelines.results import indices as index_files
from pipelines.results.index_checks import check_index
from pipelines.results.index_publishing import AnotherUpdate, publish
from pipelines.results.indices import Manifest, Segment, manifest_file
from pipelines.settings.sections import Config
from pipelines.store.extraction import drop_images
from pipelines.store.store import Store
from pipelines.upkeep import verify

DIMENSION = 8
LONGEST = 60  # steps of an update


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((count, DIMENSION), np.float32))


def asked(kind: str) -> Config:
    return settings(f"index.kind={kind}")


def new_store(place: Path, held: np.ndarray, files: int = 1) -> Store:
    store = Store.create(str(place / "store"), settings())
    for at, part in enumerate(np.array_split(held, files)):
        add_embeddings(store, "r1", sum(map(len, np.array_split(held, files)[:at])), part)
    return store


def manifest(store: Store) -> Manifest:
    found = index_files.read_manifest(store, "main")
    assert found is not None
    return found


def files(store: Store) -> set[str]:
    return {path.name for path in (Path(store.uri) / "index" / "main").iterdir()}


def recall(store: Store, held: dict[str, np.ndarray], queries: int = 30) -> float:
    """Of searches through the job against exact ones over what is held; fails where something else is found."""
    ids = np.array(sorted(held))
    matrix = np.stack([held[one] for one in ids])
    found = 0
    for at in np.linspace(0, len(ids) - 1, queries).astype(int):
        cosine = matrix @ matrix[at]
        cosine[at] = -2
        rows = search.run(settings(), store=store.uri, name="main", image=ids[at]).results
        assert {row["image_id"] for row in rows} <= held.keys() - {ids[at]} and len(rows) == 10
        for row in rows:
            assert row["similarity"] == pytest.approx(float(held[row["image_id"]] @ matrix[at]), abs=2e-3)
        found += len({row["image_id"] for row in rows} & set(ids[np.argsort(-cosine)[:10]]))
    return found / queries / 10


def sound(store: Store) -> bool:
    checked = check_index(store, "main", Store.open(store.uri, settings()).images.read(["image_id", "run_id"]))
    return checked.problems == [] and checked.notes == [] and checked.unreferenced_files == 0


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_updates_and_removals_and_merges_keep_the_answers(kind: str, tmp_path: Path) -> None:
    count = MIN_TRAINING_VECTORS + 800 if kind == "ivfpq" else 1000
    everything = vectors(count + 400)
    held = {f"{number:08d}": vector for number, vector in enumerate(everything[:count])}
    store = new_store(tmp_path, everything[:count], files=3)
    built = index.run(asked(kind), store=store.uri, name="main")
    assert (built.kind, built.count, built.segments) == (kind, count, 1)
    base = manifest(store).segments[0]

    for step in range(9):  # 20 images each time; every other time one of the base and one of the last 20 are taken out
        add_embeddings(store, f"r{step}", first := count + 20 * step, everything[first : first + 20])
        held |= {f"{number:08d}": everything[number] for number in range(first, first + 20)}
        gone = [f"{11 * step:08d}", f"{first - 17:08d}"] if step % 2 else []
        drop_images(store, gone, "r")
        held = {image_id: vector for image_id, vector in held.items() if image_id not in gone}
        updated = index.run(asked(kind), store=store.uri, name="main")
        assert (updated.status, updated.rebuilt, updated.count) == ("done", "", len(held))
        merged_into_base = kind == "hnsw" and step == 5  # the 120 are more than a tenth of its 1,000
        assert (manifest(store).segments[0] == base) == (not merged_into_base)
        base = manifest(store).segments[0]
    # eight small segments have become one, without what was taken out of them
    assert (updated.segments, updated.dead) == ((4, 5) if kind == "hnsw" else (3, 4))
    assert sound(store) and recall(store, held) >= 0.95

    # a fifth of it taken out: purged, and a graph built again
    gone = sorted(held)[: len(held) // 4]
    drop_images(store, gone, "r")
    held = {image_id: vector for image_id, vector in held.items() if image_id not in gone}
    purged = index.run(asked(kind), store=store.uri, name="main")
    assert (purged.count, purged.dead, purged.segments) == (len(held), 0, 1)
    assert bool(purged.rebuilt) == (kind == "hnsw")
    assert sound(store) and recall(store, held) >= 0.95
    assert manifest(store).next_id < count + 400


def test_an_addition_reads_neither_base_nor_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = vectors(900)
    store = new_store(tmp_path, everything[:800], files=2)
    index.run(asked("flat"), store=store.uri, name="main")
    old = set(manifest(store).images_files)
    add_embeddings(store, "r2", 800, everything[800:])

    def never(*arguments: Any) -> None:
        pytest.fail("read a file of the index")

    monkeypatch.setattr("pipelines.results.indices.read_file", never)
    read_file = index_update.Store.open(store.uri, settings()).images.read_file

    def counted(table: Any, path: str, columns: list[str] | None = None) -> Any:
        assert path not in old
        return read_file(path, columns)

    monkeypatch.setattr("pipelines.store.table.Table.read_file", counted)
    assert index.run(asked("flat"), store=store.uri, name="main").added == 100


@pytest.mark.parametrize(("kind", "dimension"), [("flat", 64), ("hnsw", 64), ("hnsw", 100_000)])
def test_segments_stay_few_and_small_and_vectors_are_written_few_times(kind: Any, dimension: int) -> None:
    """A thousand updates of a hundred vectors, by the rule alone."""

    def segment(size: int) -> Segment:
        return Segment("flat", 0, size, size, {})

    whole = Manifest(1, "", None, None, kind, "", dimension, "", 1, [], 0, 0, 0, 0, "", [segment(10_000)])
    written = base_written = 0
    for _ in range(1000):
        segments = whole.segments
        kept = index_update.kept_segments(whole, 100, 100)
        merged = 100 + sum(one.vectors for one in segments[kept:])
        written += merged
        base_written += kept == 0
        whole.segments[kept:] = [segment(merged)]
        beside = sum(one.vectors for one in whole.segments[1:])
        assert len(whole.segments) <= 3 * (index_update.MERGED_AT_ONCE - 1) + 1
        if kind == "hnsw":
            assert beside <= 0.1 * whole.segments[0].vectors and beside * dimension <= 200_000_000
    assert sum(one.vectors for one in whole.segments) == 110_000
    assert base_written <= (40 if dimension == 64 else 60) and written <= 12 * 110_000 * (1 if dimension == 64 else 3)


def test_an_index_in_a_bucket(s3: S3Server) -> None:
    """Built, added to, taken out of, refused to the slower of two, searched and verified."""
    options = [f"storage.options.{key}={value}" for key, value in s3.options.items()]
    config, uri = settings(*options), f"s3://{BUCKET}/index-{os.getpid()}"
    store = Store.create(uri, config)
    everything = vectors(120)
    add_embeddings(store, "r1", 0, everything[:100])
    assert index.run(config, store=uri, name="main").count == 100
    add_embeddings(store, "r2", 100, everything[100:])
    drop_images(store, ["00000007"], "r3")
    before = index_files.read_manifest(store, "main")
    updated = index.run(config, store=uri, name="main")
    assert (updated.added, updated.removed, updated.count, updated.segments) == (20, 1, 119, 2)
    current = index_files.read_manifest(store, "main")
    assert before is not None and current is not None
    with pytest.raises(AnotherUpdate):
        publish(store, "main", current, before, None)
    assert index_files.read_manifest(store, "main") == current
    manifests = {"manifest-1.json", "manifest-2.json"}
    assert index_files.files_present(store, "main") == before.files | current.files | manifests
    rows = search.run(config, store=uri, name="main", image="00000107", top=3).results
    cosine = everything @ everything[107]
    cosine[[7, 107]] = -2
    assert [row["image_id"] for row in rows] == [f"{at:08d}" for at in np.argsort(-cosine)[:3]]
    checked = verify.run(config, store=uri)
    assert not [problem for problem in checked.problems if "index" in problem] and checked.messages == []


COMMAND = "from pipelines.cli import main; main()"
PAUSED = f"import time, pipelines.index.job; pipelines.index.job.publish = lambda *_: time.sleep(600); {COMMAND}"


def started(store: Store, *more: str, command: str = COMMAND) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", command, "index", store.uri, "main", "--set", "index.kind=hnsw", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("first", [True, False], ids=["first build", "update"])
def test_a_killed_run_leaves_the_old_index_and_the_next_one_cleans_up(first: bool, tmp_path: Path) -> None:
    everything = vectors(1500)
    store = new_store(tmp_path, everything[:1000])
    before: Manifest | None = None
    if not first:
        index.run(asked("hnsw"), store=store.uri, name="main")
        before = manifest(store)
        add_embeddings(store, "r2", 1000, everything[1000:])  # more than a segment may hold: into the graph itself
    folder = Path(store.uri) / "index" / "main"
    present = set(files(store)) if before else set()
    process = started(store, command=PAUSED)
    deadline = time.monotonic() + 60
    while not any(path.name.endswith("images.parquet") and path.name not in present for path in folder.glob("*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = files(store) - present
    assert len(left) == 2 and index_files.read_manifest(store, "main") == before
    if before:
        content = search.IndexContent.read(store, "main", before)
        assert len(content.images) == 1000
        assert set(content.parts[0].search(everything[:9], 1)[1][:, 0]) == set(range(9))

    again = started(store, "--json")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0 and f'"added": {1000 if first else 500}' in out, err
    assert not left & files(store) and sound(store)
    kept = before.files | {"manifest-1.json", "manifest-2.json"} if before else {"manifest-1.json"}
    assert files(store) == manifest(store).files | kept


def test_two_updates_at_the_same_time_end_in_one_whole_index(tmp_path: Path) -> None:
    everything = vectors(3000)
    store = new_store(tmp_path, everything[:1500])
    index.run(asked("hnsw"), store=store.uri, name="main")
    before = manifest(store)
    add_embeddings(store, "r2", 1500, everything[1500:])
    both = [started(store), started(store)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert manifest(store).images == 3000 and sound(store)
    assert files(store) == manifest(store).files | before.files | {
        "manifest-1.json",
        manifest_file(manifest(store).number),
    }


def test_an_update_whose_manifest_another_one_removed_begins_again(tmp_path: Path) -> None:
    """Half written, it has a name that leftovers have; at every step of the update."""
    everything = vectors(40)
    for step in range(LONGEST):
        store = new_store(tmp_path / f"{step}", everything[:20])
        index.run(settings(), store=store.uri, name="main")
        add_embeddings(store, "r2", 20, everything[20:])
        with at_step(step, partial(index.run, settings(), store=store.uri, name="main")) as taken:
            result = index.run(settings(), store=store.uri, name="main")
        assert result.status in ("done", "unchanged") and manifest(store).images == 40 and sound(store)
        if len(taken) <= step:
            assert "link" in taken
            return
    raise AssertionError(f"more than {LONGEST} steps")
