"""How listing, the anti-join and commits grow with the number of images: synthetic ones, no model, no Ray.

    python -m benchmarks.scale                     (10 thousand, 100 thousand and a million; some minutes, 4 GB of disk)
    python -m benchmarks.scale 1000 10000

A figure of each step is its growth exponent between the smallest and the largest number: 1 is linear. Files are empty,
in folders of a thousand; shards hold a thousand images, and each is a commit of its own.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from benchmarks.results import Row, report
from pipelines import sources
from pipelines.settings.loading import load_config
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.parquet import new_file_name
from pipelines.store.schemas import IMAGES, descriptor_columns, patches_schema
from pipelines.store.store import Store
from pipelines.store.vectors import encode

WORK = Path(__file__).with_name("work") / "scale"
SIZES = (10_000, 100_000, 1_000_000)
SHARD = 1_000
# Few: neither embeddings nor descriptors are read here.
VECTOR_DIMENSIONS = 8
# The store is full in the last ones.
LATE_COMMITS_MEASURED = 10
# More than 1 for noise, and for caches that the largest store no longer fits.
MAX_EXPONENT = 1.15

T = TypeVar("T")

RUN_ID = "20200101T000000Z-000000"


@dataclass
class Steps:
    """Seconds of each step. nothing_new: opening the store and planning, when everything is done."""

    listing: float = 0.0
    manifest: float = 0.0
    nothing_new: float = 0.0
    one_in_hundred: float = 0.0
    all_commits: float = 0.0
    late_commit: float = 0.0


NAMES = {
    "listing": "listing a folder",
    "manifest": "listing a Parquet manifest",
    "nothing_new": "repair and anti-join, all images done",
    "one_in_hundred": "repair and anti-join, one in a hundred changed",
    "all_commits": "all commits, one for each thousand images",
    "late_commit": "one commit into the full store",
}
# the number of commits times the files of each: faster than linear, if every shard were a commit of its own. A run
# commits by the clock (run.commit_seconds), so that what counts is one commit into the full store
WITHOUT_BAR = "all_commits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=int, nargs="*", default=list(SIZES), help="numbers of images, ascending")
    sizes: list[int] = parser.parse_args().images
    measured = {}
    for size in sizes:
        measured[size] = measure(size)
        print(f"{size:,}: {measured[size]}", flush=True)
    shutil.rmtree(WORK, ignore_errors=True)
    report(
        "growth with the number of images, as an exponent",
        [_row(name, measured, sizes[0], sizes[-1]) for name in NAMES],
    )


def _row(name: str, measured: dict[int, Steps], least: int, most: int) -> Row:
    seconds = {size: getattr(steps, name) for size, steps in measured.items()}
    exponent = math.log(seconds[most] / seconds[least]) / math.log(most / least)
    bar = "" if name == WITHOUT_BAR else f"<= {MAX_EXPONENT}"
    return Row(NAMES[name], exponent, bar, "; ".join(f"{size:,}: {took:.3f} s" for size, took in seconds.items()))


def measure(images: int) -> Steps:
    shutil.rmtree(WORK, ignore_errors=True)
    steps = Steps()
    folder = _make_folder(images)
    steps.listing, listing = _timed(lambda: sources.list_images(str(folder)).table)
    assert len(listing) == images
    manifest = _make_manifest(listing)
    steps.manifest, listed = _timed(lambda: sources.list_images(str(manifest)).table)
    assert len(listed) == images

    config = load_config(overrides=["model.weights=random"])
    uri = str(WORK / "store")
    store = Store.create(uri, config)
    took = _fill(store, listing)
    steps.all_commits, steps.late_commit = sum(took), statistics.median(took[-LATE_COMMITS_MEASURED:])

    def plan(listing: pa.Table) -> int:
        opened = Store.open_existing(uri, config)
        assert opened is not None
        opened.repair(RUN_ID)
        return len(opened.plan(listing).pending)

    steps.nothing_new, pending = _timed(lambda: plan(listing))
    assert pending == 0
    changed = _change_some(listing)
    steps.one_in_hundred, pending = _timed(lambda: plan(changed))
    assert pending == images // 100
    return steps


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    gc.collect()
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _make_folder(images: int) -> Path:
    folder = WORK / "images"
    for start in range(0, images, SHARD):
        below = folder / f"{start // SHARD:05d}"
        below.mkdir(parents=True)
        for number in range(start, min(start + SHARD, images)):
            (below / f"{number:08d}.jpg").touch()
    return folder


def _make_manifest(listing: pa.Table) -> Path:
    import pyarrow.parquet as pq

    path = WORK / "manifest.parquet"
    pq.write_table(pa.table({"uri": listing["uri"], "id": listing["image_id"]}), path)
    return path


def _change_some(listing: pa.Table) -> pa.Table:
    """Every hundredth image in a newer version."""
    versions = np.array(listing["source_version"].to_pylist(), object)
    versions[::100] = "newer"
    at = listing.schema.get_field_index("source_version")
    return listing.set_column(at, "source_version", pa.array(versions, pa.string()))


def _fill(store: Store, listing: pa.Table) -> list[float]:
    """Commit shard after shard as `extract` does; seconds of each commit. Writing the shards is not counted."""
    committer = Committer(store, RUN_ID, set())
    took = []
    for start in range(0, len(listing), SHARD):
        rows = listing.slice(start, SHARD)
        shard = _write_shard(store, rows)
        ids, sizes, versions = (rows[name].to_pylist() for name in ("image_id", "source_size", "source_version"))
        known = dict(zip(ids, zip(sizes, versions, strict=True), strict=True))
        began = time.perf_counter()
        committer.commit([shard], known)
        took.append(time.perf_counter() - began)
    return took


def _write_shard(store: Store, rows: pa.Table) -> ShardReport:
    """Both files of a shard: one patch for each image."""
    name, count = new_file_name(RUN_ID), len(rows)
    vectors = encode(np.ones((count, VECTOR_DIMENSIONS), np.float32), "float32")[0]
    numbers = pa.array(np.ones(count, np.int32))
    given = {column: rows[column] for column in ("image_id", "uri", "label", "source_size", "source_version")}
    given |= {"embedding": vectors, "shard": pa.array([name] * count), "run_id": pa.array([RUN_ID] * count)}
    given["extracted_at"] = pa.array([0] * count, IMAGES.field("extracted_at").type)
    images = pa.table({field.name: given.get(field.name, numbers) for field in IMAGES}).cast(IMAGES)
    schema = patches_schema(store.config)
    given |= dict.fromkeys(descriptor_columns(store.config), vectors)
    patches = pa.table({field.name: given.get(field.name, numbers) for field in schema}).cast(schema)
    return ShardReport(
        "shard",
        list(range(count)),
        rows["image_id"].to_pylist(),
        store.patches.write_file(name, patches),
        store.images.write_file(name, images),
    )


if __name__ == "__main__":
    main()
