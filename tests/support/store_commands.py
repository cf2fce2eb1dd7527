"""What extract, prune and compact do to a real store, without Ray and a model: to be killed, paused and raced.

A store begins with images in four files of which c is old; `extract` replaces c, adds e and records x as broken;
`prune` takes a and the failure y away; `compact` changes no row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hand_made import add_images, source, write_shard
from small_runs import settings

from pipelines.store.extraction import Committer, ShardReport, drop_images
from pipelines.store.failures import failure_row
from pipelines.store.store import Store
from pipelines.upkeep import compact as compaction
from pipelines.upkeep import verify

BEFORE = {"a": "v1", "b": "v1", "c": "v1", "d": "v1"}

Contents = tuple[dict[str, str], list[str]]
"""versions of images, and failures"""


def new_store(folder: Path) -> Store:
    store = Store.create(str(folder), settings())
    for number, ids in enumerate(("ac", "bd")):
        add_images(store, f"2026010{number + 1}T000000Z-00000{number}", [source(one) for one in ids])
    commit(store, "20260103T000000Z-000003", [], ["y"])
    return store


def commit(store: Store, run_id: str, rows: list[tuple[str, str]], failed: list[str]) -> None:
    """One shard an image, given as (image_id, version), and failures."""
    written(store, run_id, rows, failed)()


def written(store: Store, run_id: str, rows: list[tuple[str, str]], failed: list[str]) -> Callable[[], object]:
    """The same in two steps: workers have written, and what is returned commits it."""
    reports = [write_shard(store, run_id, [source(image_id, version=version)], 2.0) for image_id, version in rows]
    failures = [failure_row(source(image_id), "decode", "ImageError", "broken", 1, run_id) for image_id in failed]
    versions = {image_id: (10, version) for image_id, version in rows} | dict.fromkeys(failed, (10, "v1"))
    reports.append(ShardReport("progress", failures=failures))
    return lambda: Committer(store, run_id, set()).commit(reports, versions)


def opened(uri: str) -> Store:
    return Store.open(uri, settings())


def extract(uri: str) -> None:
    store = opened(uri)
    store.repair("20260104T000000Z-000004")
    extract_written(store)()


def extract_written(store: Store) -> Callable[[], object]:
    return written(store, "20260104T000000Z-000004", [("c", "v2"), ("e", "v1")], ["x"])


def prune(uri: str) -> None:
    drop_images(opened(uri), ["a", "y"], "20260105T000000Z-000005")


def compact(uri: str) -> None:
    compaction.run(settings(), store=uri)


def compact_and_sweep(uri: str) -> None:
    compaction.run(settings("compact.retention_hours=0"), store=uri)


COMMANDS: dict[str, Callable[[str], None]] = {
    "extract": extract,
    "prune": prune,
    "compact": compact,
    "compact_and_sweep": compact_and_sweep,
}


def after(*commands: str) -> Contents:
    """What a store holds that began as `new_store` and on which some commands ran, in any order."""
    images, failures = dict(BEFORE), ["y"]
    if "extract" in commands:
        images |= {"c": "v2", "e": "v1"}
        failures.append("x")
    if "prune" in commands:
        del images["a"]
        failures.remove("y")
    return images, sorted(failures)


def contents(uri: str) -> Contents:
    """Every row once, or this fails; and nothing that verify has to say."""
    store = opened(uri)
    found = verify.run(store.config, store=uri)
    assert found.problems == []
    rows = store.images.read(["image_id", "source_version"]).to_pylist()
    assert len(rows) == len({row["image_id"] for row in rows})
    failures = store.failures.read(["image_id"])["image_id"].to_pylist()
    return {row["image_id"]: row["source_version"] for row in rows}, sorted(failures)
