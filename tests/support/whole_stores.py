"""A small store with everything that jobs leave in one, made without Ray; and what it holds, read as its users read it.

The same command makes the same values again, whichever of them are missing.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hand_made import add_described, add_failure, described
from small_results import KINDS
from small_runs import settings

from pipelines.cluster import job as cluster
from pipelines.index import job as index
from pipelines.index.search import run as search
from pipelines.results.all_kinds import all_results
from pipelines.results.clusters import ClusterTables
from pipelines.store.patches import ImagePlace, read_patch_maps
from pipelines.store.snapshots import snapshot
from pipelines.store.store import Store

IMAGES = "abcdef"
FAILED = "y"
NAME = "m"
CLUSTERS = ("cluster.k=3", "cluster.iterations=3")
INDICES = {"whole": "embeddings", "cells": "patches"}
SIDE = 2  # patches along each side of an image
# Of who made a row and when: another one where it was made again.
ABOUT_RUNS = {"run_id", "extracted_at", "failed_at", "shard", "run_id_a", "run_id_b", "set_version", "source_version"}

_numbers = itertools.count()


def whole_store(folder: Path) -> str:
    """Six images in two files, a failure, matches, parts, clusters and two indices."""
    store = Store.create(str(folder), settings()).uri
    extract(store, IMAGES[:3])
    make_results(store)
    extract(store)
    make_results(store)
    return store


def extract(store: str, images: str = IMAGES) -> None:
    """As extract does: images that are not there, each with values of its own, and the failure."""
    opened = Store.open_for_writing(store, settings())
    opened.repair(_run_id())
    opened.refresh()
    there = opened.images.read(["image_id"])["image_id"].to_pylist()
    made = {one: described(_descriptor(one)) for one in images if one not in there}
    if made:
        run_id = _run_id()
        add_described(opened, run_id, made, version=run_id)
    if FAILED not in opened.failures.read(["image_id"])["image_id"].to_pylist():
        add_failure(opened, _run_id(), FAILED)


def make_results(store: str) -> None:
    """Every other job once; clusters are trained on all images, and not before these are there."""
    for kind in KINDS:
        kind.job(store, _run_id())
    if len(Store.open(store, settings()).images.read(["image_id"])) == len(IMAGES):
        cluster.run(settings(*CLUSTERS), store=store, name=NAME, update=True)
    for name, of in INDICES.items():
        index.run(settings(f"index.of={of}", "index.kind=flat"), store=store, name=name)


def contents(store: str) -> dict[str, Any]:
    """All that users can read of a store, by what it is called, without who made it and when."""
    opened = Store.open(store, settings())
    found: dict[str, Any] = {"spec": opened.spec}
    current = snapshot(opened.log)
    for name in ("images", "patches", "failures"):
        table = getattr(opened, name)
        found[name] = _rows(current.table(name, table.schema) or table)
    opened.refresh()
    found["maps"] = _maps(opened)
    for result in all_results(opened):
        for name, table in result.tables.items():
            found[f"{result.path}/{name}"] = _rows(table)
        if isinstance(result, ClusterTables):
            model = result.model()
            found[f"{result.path}/model"] = None if model is None else model.levels[-1].centroids.tolist()
    for name, of in INDICES.items():
        for image in IMAGES:
            box = "0,0,48,48" if of == "patches" else None
            rows = search(settings(), store=store, name=name, image=image, box=box, top=100).results
            found[f"index/{name}/{image}"] = sorted(
                (row["image_id"], row.get("row"), row.get("col"), round(row["similarity"], 4)) for row in rows
            )
    return found


def _rows(table: Any) -> list[dict[str, Any]]:
    names = [name for name in table.schema.names if name not in ABOUT_RUNS]
    rows: pa.Table = table.read(names)
    return sorted(rows.to_pylist(), key=lambda row: str([row[name] for name in names[:6]]))


def _maps(store: Store) -> list[Any]:
    rows = store.images.read(["image_id", "shard", "grid_height", "grid_width"]).to_pylist()
    places = [ImagePlace(row["image_id"], row["shard"], (row["grid_height"], row["grid_width"])) for row in rows]
    maps = read_patch_maps(store.uri, places, "descriptor", True, {})
    found = {place.image_id: maps.of(place.image_id) for place in places}
    return [(one, found[one].descriptor.tolist(), found[one].saliency.tolist()) for one in sorted(found)]


def _descriptor(image_id: str) -> np.ndarray:
    return np.random.default_rng(ord(image_id)).standard_normal((SIDE, SIDE, 8)).astype(np.float32)


def _run_id() -> str:
    return f"20260101T000000Z-{next(_numbers):06x}"
