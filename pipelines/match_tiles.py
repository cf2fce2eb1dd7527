"""Laying out pairs on a Ray cluster, so that descriptors are read for tiles of images and not for each pair.

Images in the order of their files are cut into blocks of about 256 MB. The pairs of two blocks are a tile. Going
through the tiles row by row, a block is read once into Ray's object store for each tile that needs it (the row's own
block once for the row), only the images that have pairs there, and every task of the tile shares it. What is read
grows with the images times the number of blocks, whatever the number of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.match_worker import MatchReport, MatchSetup, PairRow, load_images, match_pairs
from pipelines.pairs import Pairs
from pipelines.patch_maps import ImagePlace
from pipelines.ray_session import explain_ray_error

BLOCK_BYTES = 256 * 2**20
OBJECT_STORE_SHARE = 8  # a block takes at most this part of it: two are at work, others wait or are being read
PATCH_PRODUCTS_A_SECOND = 30e6  # of one CPU, binned: patches of one image times those of the other
SELECTION_SECONDS = 0.02  # of a pair, besides
TASK_SECONDS = (3.0, 8.0)  # least: worth a worker's start and a file; most: commits are due, kills cost little
TASKS_A_WORKER = 2  # at least, where there is enough to do, so that workers finish together
GPU_SHARE = 0.25  # the selection runs on the CPU meanwhile


@dataclass(frozen=True)
class Tile:
    """The pairs between two blocks of images; `pairs` are positions in the pending ones."""

    block_a: int
    block_b: int
    pairs: np.ndarray


def cut_blocks(shards: list[str], bytes_each: np.ndarray, most_bytes: float, most_images: int | None) -> np.ndarray:
    """The block (n,) of each image: neighbours in their files stay together, blocks are of bounded size.

    Images come in key order, in which a shard is a stretch: shards are taken by the first image of each.
    """
    first_seen = {shard: at for at, shard in reversed(list(enumerate(shards)))}
    order = np.argsort([first_seen[shard] for shard in shards], kind="stable")
    blocks = np.zeros(len(shards), np.int64)
    block, used, images = 0, 0.0, 0
    for image in order:
        if images and (used + bytes_each[image] > most_bytes or images == most_images):
            block, used, images = block + 1, 0.0, 0
        blocks[image] = block
        used, images = used + bytes_each[image], images + 1
    return blocks


def make_tiles(pairs: Pairs, blocks: np.ndarray) -> list[Tile]:
    """Every pair in one tile, tiles row by row."""
    sides = np.sort(np.stack([blocks[pairs.a], blocks[pairs.b]]), axis=0)
    order = np.lexsort((sides[1], sides[0]))
    sides = sides[:, order]
    changes = np.any(np.diff(sides, axis=1) != 0, axis=0) if len(order) else np.zeros(0, bool)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(order)]])
    return [
        Tile(int(sides[0, start]), int(sides[1, start]), np.sort(order[start:end]))
        for start, end in pairwise(starts)
        if end > start
    ]


def stream_matches(
    setup: MatchSetup,
    pairs: Pairs,
    scores: list[float | None],
    images: pa.Table,
    values: float,
    resources: dict[str, float],
) -> Iterator[MatchReport]:
    """Match pairs on Ray and yield what its workers wrote, in the order in which they finish.

    images: image_id, shard, grid_height, grid_width, run_id. values: of a descriptor, about.

    Raises JobError for what stops a worker.
    """
    import ray
    from ray.exceptions import RayError

    run = setup.config.run
    columns = {name: images[name].to_pylist() for name in ("image_id", "shard", "run_id")}
    grids = np.stack([images[name].to_numpy() for name in ("grid_height", "grid_width")], axis=1).astype(np.int64)
    cells = grids.prod(axis=1)
    value_bytes = 2 if setup.half else 4
    most_bytes = min(BLOCK_BYTES, resources.get("object_store_memory", math.inf) / OBJECT_STORE_SHARE)
    blocks = cut_blocks(columns["shard"], cells * values * value_bytes, most_bytes, setup.config.correspond.tile_images)
    seconds = cells[pairs.a] * cells[pairs.b] / PATCH_PRODUCTS_A_SECOND + SELECTION_SECONDS

    gpu = setup.device == "cuda"
    cpus_each = run.cpus_per_worker or 1.0
    gpus_each = (run.gpus_per_worker or GPU_SHARE) if gpu else 0.0
    slots = [resources.get("CPU", 1.0) / cpus_each] + ([resources["GPU"] / gpus_each] if gpu else [])
    workers = run.workers or max(1, int(min(slots)))
    task_seconds = float(np.clip(seconds.sum() / (workers * TASKS_A_WORKER), *TASK_SECONDS))
    load = ray.remote(load_images).options(num_cpus=cpus_each)
    match = ray.remote(match_pairs).options(num_cpus=cpus_each, num_gpus=gpus_each)

    def read(chosen: np.ndarray, block: int) -> Any:
        wanted = _images_in(pairs, chosen, blocks, block)
        places = [ImagePlace(columns["image_id"][i], columns["shard"][i], tuple(grids[i].tolist())) for i in wanted]
        return load.remote(setup, places)

    def pair_row(at: int) -> PairRow:
        a, b = pairs.a[at], pairs.b[at]
        ids, runs = columns["image_id"], columns["run_id"]
        return PairRow(ids[a], ids[b], scores[at], pairs.source, runs[a], runs[b])

    def tasks() -> Iterator[Any]:
        for block, tiles_of_row in groupby(make_tiles(pairs, blocks), lambda tile: tile.block_a):
            row = list(tiles_of_row)
            row_block = read(np.concatenate([tile.pairs for tile in row]), block)
            for tile in row:
                loaded = [row_block] if tile.block_b == block else [row_block, read(tile.pairs, tile.block_b)]
                for chunk in _chunks(tile.pairs, seconds, task_seconds):
                    yield match.remote(setup, [pair_row(at) for at in chunk], *loaded)

    waiting: list[Any] = []
    upcoming = tasks()
    try:
        while True:
            # one more than there are workers waits with its blocks read
            while len(waiting) <= workers and (task := next(upcoming, None)) is not None:
                waiting.append(task)
            if not waiting:
                return
            finished, waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(finished[0])
    except RayError as error:
        raise explain_ray_error(error, "the matching") from None


def _images_in(pairs: Pairs, chosen: np.ndarray, blocks: np.ndarray, block: int) -> np.ndarray:
    """Images of one block that have a part in the chosen pairs, ascending."""
    images = np.unique(np.concatenate([pairs.a[chosen], pairs.b[chosen]]))
    return images[blocks[images] == block]


def _chunks(pairs: np.ndarray, seconds: np.ndarray, task_seconds: float) -> list[np.ndarray]:
    """Pairs of a tile cut into tasks of about task_seconds each."""
    spent = np.cumsum(seconds[pairs])
    count = min(len(pairs), max(1, round(spent[-1] / task_seconds)))
    cuts = np.searchsorted(spent, spent[-1] * np.arange(1, count) / count)
    return [chunk for chunk in np.split(pairs, np.unique(cuts)) if len(chunk)]
