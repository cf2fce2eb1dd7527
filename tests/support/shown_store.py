"""A store whose every table is known, for reports: scenes of known kinds of patches, and what jobs would find."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from set_scenes import PATCH_PIXELS, Scene, add_scenes, scene
from tables_by_hand import commit_by_hand

from pipelines.results.clusters import ClusterTables
from pipelines.results.matches import MatchTables
from pipelines.results.parts import PartTables
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.store.parquet import new_file_name
from pipelines.store.schemas import ASSIGNMENTS, CENTROIDS, MATCHES, PAIRS, PARTS_IMAGES, PARTS_PATCHES
from pipelines.store.store import Store
from pipelines.store.table import Table

RUN = "20260101T000000Z-000001"


def spec(*overrides: str) -> Config:
    base = ("model.name=vit_tiny_patch16_224", "model.weights=random", "image.native=true")
    return load_config([], [*base, *overrides])


def scenes(image_ids: Sequence[str], first_seed: int = 0, size: int = 12) -> dict[str, Scene]:
    """A scene for each image, its patch centres in pixels of its picture."""
    made = {}
    for seed, image_id in enumerate(image_ids, first_seed):
        one = scene(seed, size=size)
        y, x = ((axis + 0.5).astype(np.float32) * PATCH_PIXELS for axis in np.mgrid[:size, :size])
        made[image_id] = dataclasses.replace(one, features=dataclasses.replace(one.features, y=y, x=x))
    return made


def shown_store(folder: Path, made: Mapping[str, Scene], *overrides: str) -> Store:
    """A store of scenes whose pictures are files below `folder`."""
    store = Store.create(str(folder / "store"), spec(*overrides))
    (folder / "pictures").mkdir(exist_ok=True)
    add_scenes(store, 1, dict(made), folder / "pictures")
    store.refresh()
    return store


def add_clusters(store: Store, made: Mapping[str, Scene], name: str = "words") -> None:
    """Every kind of patch is a cluster. A patch is nearer to its centroid the further up and left it is."""
    tables = ClusterTables.open_or_make(store.uri, name, {})
    rows: list[dict[str, Any]] = []
    for image_id in sorted(made):
        kinds = made[image_id].kinds
        for (row, col), kind in np.ndenumerate(kinds):
            distance = (row * kinds.shape[1] + col) / kinds.size
            place = {"row": row, "col": col, "cluster_id": int(kind), "distance": distance}
            rows.append({"image_id": image_id, **place, "saliency": 0.5, "run_id": RUN})
    _commit(tables.assignments, rows, ASSIGNMENTS)
    sizes = np.bincount([row["cluster_id"] for row in rows], minlength=4)
    centroids = [
        {"cluster_id": kind, "size": int(size), "inertia": 0.0, "salient_votes": 0, "centroid": [1.0]}
        for kind, size in enumerate(sizes)
    ]
    _commit(tables.centroids, centroids, CENTROIDS)


def add_parts(store: Store, made: Mapping[str, Scene], name: str = "things", note: str | None = None) -> None:
    """The two kinds of the object are its parts."""
    tables = PartTables.open_or_make(store.uri, name, {})
    images: list[dict[str, Any]] = []
    for image_id in sorted(made):
        mask = (made[image_id].kinds.repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1) + 1) % 5
        mask[mask > 2] = 0
        pngs = {"mask_png": png(mask.astype(np.uint8)), "foreground_png": png((mask > 0).astype(np.uint8) * 255)}
        facts = {"set_id": "all", "foreground_fraction": float((mask > 0).mean()), "note": note, "shard": "x.parquet"}
        images.append({"image_id": image_id, **facts, **pngs, "run_id": RUN, "set_version": "1"})
    _commit(tables.images, images, PARTS_IMAGES)
    first = {"image_id": min(made), "set_id": "all", "row": 0, "col": 0, "part_id": -1}
    _commit(tables.patches, [first], PARTS_PATCHES)


def add_matches(store: Store, pairs: Mapping[tuple[str, str], Sequence[float]], name: str = "nearest") -> None:
    """For each pair matches of given similarities, best first; the n-th joins (n, n + 1) and (n + 2, n + 3)."""
    tables = MatchTables.open_or_make(store.uri, name, {})
    rows: list[dict[str, Any]] = []
    about: list[dict[str, Any]] = []
    file = new_file_name(RUN)
    for (a, b), similarities in sorted(pairs.items()):
        runs = {"run_id_a": RUN, "run_id_b": RUN}
        counts = {"score": 0.75, "source": "knn", "mutual": 20, "kept": len(similarities)}
        about.append({"image_a": a, "image_b": b, **counts, "shard": file if similarities else None, **runs})
        for at, similarity in enumerate(similarities):
            cells = {"row_a": at, "col_a": at + 1, "row_b": at + 2, "col_b": at + 3}
            centres = {axis: (cell + 0.5) * PATCH_PIXELS for axis, cell in _axes(cells)}
            facts = {"similarity": similarity, "saliency": 0.5, "rank": at}
            rows.append({"image_a": a, "image_b": b, **cells, **centres, **facts})
    _commit(tables.matches, rows, MATCHES, file)
    _commit(tables.pairs, about, PAIRS)


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _axes(cells: Mapping[str, int]) -> list[tuple[str, int]]:
    """row_a -> y_a, col_a -> x_a."""
    return [(name.replace("row", "y").replace("col", "x"), cell) for name, cell in cells.items()]


def _commit(table: Table, rows: Sequence[dict[str, Any]], schema: pa.Schema, name: str | None = None) -> None:
    file = table.write_file(name or new_file_name(RUN), pa.Table.from_pylist(list(rows), schema=schema))
    commit_by_hand(table, [file], [], RUN)
