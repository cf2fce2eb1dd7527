"""stats: what it counts is what is there, and it reads little for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_made import add_failure, add_images, source
from small_results import KINDS, Kind, new_store
from small_runs import settings

from pipelines.running.reports import RunReport
from pipelines.store.store import Store
from pipelines.upkeep import stats


def test_rows_bytes_labels_and_failures_are_counted(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "r1", [{**source("a", 0), "label": "cat"}, {**source("b", 1), "label": "dog"}])
    add_images(made, "r2", [{**source("c", 0), "label": "cat"}])
    for image_id, error in [("d", "ImageError"), ("e", "ImageError"), ("f", "WorkerDied")]:
        add_failure(made, "r2", image_id, error)
    counted = stats.run(settings(), store=made.uri)
    assert (counted.images, counted.patches, counted.failures, counted.labels) == (3, 36, 3, 2)
    assert counted.files == {"images": 2, "patches": 2, "failures": 3}
    for table, size in counted.bytes.items():
        assert size == sum(path.stat().st_size for path in (Path(made.uri) / table).glob("*.parquet"))
    assert counted.bytes_per_image == pytest.approx(sum(counted.bytes.values()) / 3, abs=0.1)
    assert list(counted.failures_by_reason.items()) == [("decode: ImageError", 2), ("decode: WorkerDied", 1)]


def test_an_empty_store_counts_nothing(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings())
    counted = stats.run(settings(), store=made.uri)
    assert (counted.images, counted.patches, counted.failures, counted.bytes_per_image) == (0, 0, 0, None)
    assert counted.runs == []


def test_every_run_is_shown_with_its_outcome(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings())
    RunReport("extract", made.uri, settings(), "r1", {}).finish("failed", result={"extracted": 5, "failed": 1})
    RunReport("extract", made.uri, settings(), "r2", {}).finish("interrupted", result={"extracted": 7})
    RunReport("extract", made.uri, settings(), "r3", {}).write()  # killed: nobody finished it
    shown = [(run["run_id"], run["status"], run["extracted"]) for run in stats.run(settings(), store=made.uri).runs]
    assert shown == [("r1", "failed", 5), ("r2", "interrupted", 7), ("r3", "running", None)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_results_of_other_jobs_are_counted_by_kind_and_name(tmp_path: Path, kind: Kind) -> None:
    store = new_store(str(tmp_path / "store"), "abc").uri
    before = stats.run(settings(), store=store)
    assert before.results[kind.name] == {} and f"{kind.name}/m" not in before.described
    kind.job(store, "r2")
    counted = stats.run(settings(), store=store)
    (counts,) = counted.results[kind.name].values()
    folder = tmp_path / "store" / kind.name / "m"
    files = list(folder.rglob("*.parquet"))
    assert (counts["files"], counts["bytes"]) == (len(files), sum(path.stat().st_size for path in files))
    things = "pairs" if kind.name == "matches" else "images"
    assert (
        counts[things] == len(kind.wanted(list("abc")))
        and f"{counts[things]} {things}" in counted.described[f"{kind.name}/m"]
    )
    assert counted.as_dict()[kind.name] == {"m": counts} and "described" not in counted.as_dict()


def test_no_patches_are_read(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "r1", [source("a")])
    before = stats.run(settings(), store=made.uri)
    for path in (tmp_path / "store" / "patches").glob("*.parquet"):
        path.unlink()
    assert stats.run(settings(), store=made.uri).patches == before.patches > 0
