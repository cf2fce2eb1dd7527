"""The job: a distributed pass of k-means against faiss and torch on the same cores, and memory against the cache.

make bench        (this part: about three minutes)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import torch

from benchmarks.memory import run_and_measure
from benchmarks.results import Row, report
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.parquet import new_file_name, write_parquet
from pipelines.store.schemas import IMAGES, patches_schema
from pipelines.store.store import Store
from pipelines.store.vectors import encode

WORK = Path(__file__).with_name("work")
WHOLE, QUARTER = WORK / "cluster", WORK / "cluster-quarter"
# Together 1,000,000 patches.
IMAGES_STORED, GRID, CHANNELS, K = 5_000, (10, 20), 384, 1_024
IMAGES_A_SHARD, IMAGES_A_ROW_GROUP = 1_000, 64
PASSES = 5
# A worker holds in half precision what is stored like that.
BYTES_PER_VALUE_IN_MEMORY = 2


def main() -> None:
    config = load_config(overrides=["model.weights=random"])
    _store(WHOLE, config, IMAGES_STORED)
    _store(QUARTER, config, IMAGES_STORED // 4)
    vectors = f"{IMAGES_STORED * GRID[0] * GRID[1]:,} x {CHANNELS} vectors"
    report(f"cluster, {vectors}, k = {K:,}", [*passes(), *memory()])


def passes() -> list[Row]:
    """A pass of the job, as a user runs it, and one of a single process over the same vectors in memory."""
    before = _single_process()
    result = json.loads(subprocess.run(_command(WHOLE, "bench", "--json"), capture_output=True, check=True).stdout)
    after = _single_process()
    single = {name: (before[name] + after[name]) / 2 for name in before}
    best = min(single, key=lambda name: single[name])
    figures = f"{result['pass_seconds']:.2f} s; " + ", ".join(f"{name} {spent:.2f} s" for name, spent in single.items())
    return [Row(f"pass of the job / of {best}", result["pass_seconds"] / single[best], "<= 1.3", figures)]


def memory() -> list[Row]:
    """Peak memory of the whole job with one budget: for vectors that fit it, and for four times as many."""
    budget = IMAGES_STORED // 4 * GRID[0] * GRID[1] * CHANNELS * BYTES_PER_VALUE_IN_MEMORY
    peaks = {
        folder: run_and_measure(_command(folder, "memory", f"--set=cluster.cache_gb={1.01 * budget / 1e9}"))
        for folder in (QUARTER, WHOLE)
    }
    figures = f"{peaks[QUARTER] / 2**20:,.0f} and {peaks[WHOLE] / 2**20:,.0f} MiB, budget {budget / 2**20:,.0f} MiB"
    ratio = peaks[WHOLE] / peaks[QUARTER]
    return [Row("peak memory, vectors of 4 budgets / of 1", ratio, "<= 1.2", figures)]


def _command(folder: Path, name: str, *options: str) -> list[str]:
    command = [str(Path(sys.executable).with_name("dinoray")), "cluster", str(folder), name]
    return [*command, "--k", str(K), f"--set=cluster.iterations={PASSES}", "--set=cluster.tolerance=0", *options]


def _single_process() -> dict[str, float]:
    """Seconds of a pass of the best implementations that are installed, vectors in memory as float32."""
    vectors = _vectors(np.random.default_rng(0), IMAGES_STORED * GRID[0] * GRID[1])
    return {"faiss": _faiss_pass(vectors), "torch": _torch_pass(torch.from_numpy(vectors))}


def _faiss_pass(vectors: np.ndarray) -> float:
    def train(iterations: int) -> float:
        kmeans = faiss.Kmeans(CHANNELS, K, niter=iterations, seed=0, spherical=True, max_points_per_centroid=10**9)
        started = time.perf_counter()
        kmeans.train(vectors)
        return time.perf_counter() - started

    # What it does before the first iteration cancels out.
    return (train(3) - train(1)) / 2


def _torch_pass(vectors: torch.Tensor, block: int = 1_024) -> float:
    centroids = vectors[:K]
    started = time.perf_counter()
    sums, sizes = torch.zeros(K, CHANNELS, dtype=torch.float64), torch.zeros(K)
    for rows in vectors.split(block):
        labels = (rows @ centroids.T).argmax(dim=1)
        sums.index_add_(0, labels, rows.double())
        sizes += torch.bincount(labels, minlength=K)
    return time.perf_counter() - started


def _vectors(generator: np.random.Generator, count: int) -> np.ndarray:
    """Unit vectors around 3,000 centres: (count, CHANNELS) float32."""
    centres = np.random.default_rng(7).standard_normal((3_000, CHANNELS), np.float32)
    found = np.empty((count, CHANNELS), np.float32)
    for first in range(0, count, 100_000):
        rows = found[first : first + 100_000]
        rows[:] = centres[generator.integers(0, len(centres), len(rows))]
        rows += 0.7 * generator.standard_normal(rows.shape, np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def _store(folder: Path, config: Config, images_stored: int) -> None:
    """A store with vectors of the same kind, its tables written as extract does."""
    if folder.exists():
        shutil.rmtree(folder)
    store = Store.create(str(folder), config)
    generator = np.random.default_rng(0)
    cells = GRID[0] * GRID[1]
    for first in range(0, images_stored, IMAGES_A_SHARD):
        ids = [f"{at:06d}" for at in range(first, min(first + IMAGES_A_SHARD, images_stored))]
        rows, cols = np.divmod(np.tile(np.arange(cells, dtype=np.int32), len(ids)), np.int32(GRID[1]))
        columns = [
            pa.array(np.repeat(ids, cells)),
            *(pa.array(values) for values in (rows, cols, rows.astype(np.float32), cols.astype(np.float32))),
            pa.array(generator.random(len(rows), dtype=np.float32)),
            *encode(_vectors(generator, len(rows)), "float16"),
        ]
        patches = pa.Table.from_arrays(columns, schema=patches_schema(config))
        name = new_file_name("bench")
        written = write_parquet(store.patches.uri, name, patches, None, cells * IMAGES_A_ROW_GROUP)
        about = {"source_size": 1, "source_version": "1", "grid_width": GRID[1], "grid_height": GRID[0]}
        made = pa.Table.from_pylist(
            [{"image_id": image_id, "shard": name, "run_id": "bench", **about} for image_id in ids], schema=IMAGES
        )
        images = write_parquet(store.images.uri, name, made)
        shard = ShardReport("shard", [], ids, written, images)
        Committer(store, "bench", set()).commit([shard], dict.fromkeys(ids, (1, "1")))


if __name__ == "__main__":
    main()
