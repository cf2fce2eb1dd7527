"""Stores made by hand: shards as workers write them, without a model and without Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dino_ops.extractor import ImageFeatures
from pipelines import sources
from pipelines.extract.shards import ShardWriter
from pipelines.settings.sections import Config
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.failures import failure_row
from pipelines.store.store import Store

# Rows and columns.
GRID = (3, 4)
DIMENSIONS = 8


def features(value: float = 1.0, grid: tuple[int, int] = GRID) -> ImageFeatures:
    """Features whose every number is known."""
    y, x = (axis.astype(np.float32) for axis in np.mgrid[: grid[0], : grid[1]])
    return ImageFeatures(
        descriptor=np.full((*grid, DIMENSIONS), value, np.float32),
        extra={},
        saliency=np.linspace(0, 1, grid[0] * grid[1], dtype=np.float32).reshape(grid),
        embedding=np.full(DIMENSIONS, value, np.float32),
        y=y,
        x=x,
        width=64,
        height=48,
        model_width=64,
        model_height=48,
    )


def source(image_id: str, position: int = 0, version: str = "v1") -> dict[str, Any]:
    """A listing row of an image that is never fetched."""
    facts = {"uri": f"/in/{image_id}", "label": None, "source_size": 10, "source_version": version}
    return {"position": position, "image_id": image_id, **facts}


def write_shard(store: Store, run_id: str, rows: list[dict[str, Any]], value: float = 1.0) -> ShardReport:
    """Write one shard of images, given as listing rows in key order; no reader sees it before it is committed."""
    writer = ShardWriter(store.uri, store.config, run_id)
    for row in rows:
        writer.add(row, features(value))
    patches, images = writer.close()
    return ShardReport("shard", writer.positions, writer.image_ids, patches, images)


def add_images(store: Store, run_id: str, rows: list[dict[str, Any]]) -> None:
    """Commit one shard of images, given as listing rows in key order."""
    report = write_shard(store, run_id, rows)
    versions = {row["image_id"]: (row["source_size"], row["source_version"]) for row in rows}
    Committer(store, run_id, set()).commit([report], versions)


def add_failure(store: Store, run_id: str, image_id: str, error: str = "ImageError") -> None:
    """Commit one failure."""
    row = failure_row(source(image_id), "decode", error, "it is broken", 1, run_id)
    report = ShardReport("progress", failures=[row])
    Committer(store, run_id, set()).commit([report], {image_id: (10, "v1")})


def finished_store(input: Path, store: Path, config: Config) -> Store:
    """A store in which every image of INPUT is done, so that `extract` has nothing left to do."""
    made = Store.create(str(store), config)
    rows = sources.list_images(str(input)).table.to_pylist()
    add_images(made, "20200101T000000Z-000000", [{**row, "position": at} for at, row in enumerate(rows)])
    return made


def add_described(store: Store, run_id: str, images: dict[str, ImageFeatures], version: str = "v1") -> None:
    """Commit one shard of images whose features are given, in key order; older rows of the same images go."""
    writer = ShardWriter(store.uri, store.config, run_id)
    rows = [source(image_id, at, version) for at, image_id in enumerate(sorted(images))]
    for row in rows:
        writer.add(row, images[row["image_id"]])
    patches, written = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, written)
    versions = {row["image_id"]: (row["source_size"], row["source_version"]) for row in rows}
    Committer(store, run_id, set(images)).commit([report], versions)


def described(descriptor: np.ndarray, saliency: np.ndarray | None = None) -> ImageFeatures:
    """Features with a given descriptor map (gh, gw, D); its mean is the embedding."""
    grid_height, grid_width, _ = descriptor.shape
    made = features(grid=(grid_height, grid_width))
    embedding = descriptor.reshape(-1, descriptor.shape[-1]).mean(axis=0).astype(np.float32)
    return dataclasses.replace(
        made,
        descriptor=descriptor.astype(np.float32),
        embedding=embedding,
        saliency=made.saliency if saliency is None else saliency.astype(np.float32),
    )
