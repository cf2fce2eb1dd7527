"""Laying out pairs on a Ray cluster, so that descriptors are read for many pairs and not for each.

Images in the order of their files are cut into blocks, at the row groups of the files where that is possible, since a
row group is what a file is read by. As many neighbouring blocks as half of Ray's object store holds are a band. The
pairs of a band among its own images and with those of one later block are a tile. Going through the bands, the blocks
of a band are read once and stay, and each later block that has pairs with it passes by: only the images that have
pairs there are read, and every task of the tile shares them.

What is read grows with the images, whatever the number of pairs: where all descriptors fit into one band each is read
once, with n bands up to (n + 1) / 2 times, less where few blocks have pairs with each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.correspond.pairs import Pairs
from pipelines.correspond.worker import MatchSetup, PairRow, load_images, match_pairs
from pipelines.results.matches import MatchReport
from pipelines.running.layout import Layout, plan_workers
from pipelines.running.tasks import as_task, finished_tasks
from pipelines.settings.sections import Config
from pipelines.store.parquet import IMAGES_PER_ROW_GROUP, ROWS_PER_ROW_GROUP
from pipelines.store.patches import ImagePlace

MOST_BLOCK_BYTES = 256 * 2**20
# Besides the blocks of the band, some are at work or being read.
MOST_BLOCK_SHARE_OF_OBJECT_STORE = 1 / 8
BAND_SHARE_OF_OBJECT_STORE = 0.5
ASSUMED_OBJECT_STORE_BYTES = 2 * 2**30
# Patches of one image times those of the other, binned.
PATCH_PRODUCTS_PER_CPU_SECOND = 30e6
SELECTION_SECONDS_PER_PAIR = 0.02
# Shorter ones are not worth a worker's start and a file; after longer ones commits come late, and kills cost much.
LEAST_TASK_SECONDS, MOST_TASK_SECONDS = 3.0, 8.0
# Several each, where there is enough to do, so that workers finish together.
LEAST_TASKS_PER_WORKER = 2
# A GPU is idle while a task selects on the CPU.
GPUS_PER_TASK = 0.25
SALIENCY_Y_X_BYTES = 3 * 4


@dataclass(frozen=True)
class Tile:
    """The pairs of a band of blocks with one later block, or among its own (block is None).

    pairs: positions in the pending ones, those of the same two blocks together.
    """

    band: int
    block: int | None
    pairs: np.ndarray


def cut_blocks(shards: list[str], cells: np.ndarray, most_cells: float, most_images: int | None) -> np.ndarray:
    """The block (n,) of each image: neighbours in their files stay together, blocks hold at most so many cells.

    Images come in key order, in which a shard is a stretch: shards are taken by the first image of each. Blocks end
    with row groups, as writers of shards make them, unless one is larger than a block may be.
    """
    first_seen = {shard: at for at, shard in reversed(list(enumerate(shards)))}
    order = np.argsort([first_seen[shard] for shard in shards], kind="stable")
    blocks = np.zeros(len(shards), np.int64)
    block, used, images = 0, 0, 0
    for group in _row_groups(order, shards, cells):
        fits = used + cells[group].sum() <= most_cells and (most_images is None or images + len(group) <= most_images)
        if images and not fits:
            block, used, images = block + 1, 0, 0
        for image in group:
            if images and (used + cells[image] > most_cells or images == most_images):
                block, used, images = block + 1, 0, 0
            blocks[image] = block
            used, images = used + int(cells[image]), images + 1
    return blocks


def _row_groups(order: np.ndarray, shards: list[str], cells: np.ndarray) -> Iterator[list[int]]:
    """The images of each row group, as extract's writer cuts them."""
    group: list[int] = []
    rows = 0
    for image in order.tolist():
        full = len(group) >= IMAGES_PER_ROW_GROUP or rows >= ROWS_PER_ROW_GROUP
        if group and (full or shards[image] != shards[group[-1]]):
            yield group
            group, rows = [], 0
        group.append(image)
        rows += int(cells[image])
    if group:
        yield group


def make_tiles(pairs: Pairs, blocks: np.ndarray, band_blocks: int) -> list[Tile]:
    """Every pair in one tile, band after band; a band's own pairs first."""
    low, high = np.sort(np.stack([blocks[pairs.a], blocks[pairs.b]]), axis=0)
    band = low // band_blocks
    block = np.where(high // band_blocks == band, -1, high)
    order = np.lexsort((low, high, block, band))
    keys = np.stack([band, block])[:, order]
    changes = np.any(np.diff(keys, axis=1) != 0, axis=0) if len(order) else np.zeros(0, bool)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(order)]])
    return [
        Tile(int(keys[0, start]), None if keys[1, start] < 0 else int(keys[1, start]), order[start:end])
        for start, end in pairwise(starts)
        if end > start
    ]


def plan_matching(resources: Mapping[str, float], config: Config) -> Layout:
    """The tasks that run at once. Raises RequestError when the cluster does not have what was asked for."""
    return plan_workers(resources, config, usual_cpus=1.0, usual_gpus=GPUS_PER_TASK, whole_cpus=True)


def stream_matches(
    setup: MatchSetup,
    pairs: Pairs,
    scores: np.ndarray | None,
    images: pa.Table,
    values: float,
    layout: Layout,
) -> Generator[MatchReport]:
    """Match pairs on Ray and yield what its workers wrote, in the order in which they finish.

    images: image_id, shard, grid_height, grid_width, run_id. values: about how many a descriptor has.

    Raises JobError for what stops a worker.
    """
    run = setup.config.run
    columns = {name: images[name].to_pylist() for name in ("image_id", "shard", "run_id")}
    grids = np.stack([images[name].to_numpy() for name in ("grid_height", "grid_width")], axis=1).astype(np.int64)
    cells = grids.prod(axis=1)
    cell_bytes = values * (2 if setup.half else 4) + SALIENCY_Y_X_BYTES
    object_store = _smallest_object_store()
    most_cells = min(MOST_BLOCK_BYTES, object_store * MOST_BLOCK_SHARE_OF_OBJECT_STORE) / cell_bytes
    blocks = cut_blocks(columns["shard"], cells, most_cells, setup.config.correspond.tile_images)
    largest_block = np.bincount(blocks, cells).max() * cell_bytes
    band_blocks = max(1, int(object_store * BAND_SHARE_OF_OBJECT_STORE / largest_block))
    seconds = cells[pairs.a] * cells[pairs.b] / PATCH_PRODUCTS_PER_CPU_SECOND + SELECTION_SECONDS_PER_PAIR

    workers = layout.workers
    share = seconds.sum() / (workers * LEAST_TASKS_PER_WORKER)
    # a kill loses tasks that are not finished, and those that are not committed yet
    most_seconds = min(MOST_TASK_SECONDS, run.commit_seconds / 2)
    task_seconds = float(min(max(share, LEAST_TASK_SECONDS), most_seconds))
    load, match = as_task(load_images, layout, gpu=False), as_task(match_pairs, layout)

    def read(chosen: np.ndarray, block: int) -> Any:
        wanted = _images_in(pairs, chosen, blocks, block)
        places = [ImagePlace(columns["image_id"][i], columns["shard"][i], tuple(grids[i].tolist())) for i in wanted]
        return load.remote(setup, places)

    def pair_row(at: int) -> PairRow:
        a, b = pairs.a[at], pairs.b[at]
        ids, runs = columns["image_id"], columns["run_id"]
        score = None if scores is None else float(scores[at])
        return PairRow(ids[a], ids[b], score, pairs.source, runs[a], runs[b])

    def tasks() -> Iterator[Any]:
        tiles_of_band = groupby(make_tiles(pairs, blocks, band_blocks), lambda tile: tile.band)
        for band, tiles in ((band, list(some)) for band, some in tiles_of_band):
            in_band = np.concatenate([tile.pairs for tile in tiles])
            loaded: dict[int, Any] = {}
            for tile in tiles:
                passing: dict[int, Any] = {}
                for chunk in _chunks(tile.pairs, seconds, task_seconds):
                    needed = np.unique(np.concatenate([blocks[pairs.a[chunk]], blocks[pairs.b[chunk]]])).tolist()
                    for block in needed:
                        if block // band_blocks != band:
                            passing[block] = passing.get(block) or read(tile.pairs, block)
                        elif block not in loaded:
                            loaded[block] = read(in_band, block)
                    read_blocks = loaded | passing
                    yield match.remote(setup, [pair_row(at) for at in chunk], *(read_blocks[block] for block in needed))

    upcoming = tasks()
    with contextlib.closing(finished_tasks(lambda: next(upcoming, None), workers, "the matching")) as finished:
        for _, report in finished:
            yield report


def _smallest_object_store() -> float:
    """Bytes of shared memory of the node that has the least: blocks are copied to every node that works with them."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    known = [node.get("object_store_memory", ASSUMED_OBJECT_STORE_BYTES) for node in nodes]
    return min(known, default=ASSUMED_OBJECT_STORE_BYTES)


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
