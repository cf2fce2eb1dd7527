"""The job: 500 pairs over 100 images, against a loop that reloads both images for every pair.

make bench        (this part: about a minute)
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from deltalake import DeltaTable

from benchmarks.results import Row, report
from dino_ops.correspondences import find_correspondences
from dino_ops.extractor import ImageFeatures
from pipelines.correspond import job as correspond
from pipelines.correspond.pairs import pairs_of_file
from pipelines.extract.shards import ShardWriter
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.store import Store
from pipelines.store.vectors import decode

WORK = Path(__file__).with_name("work")
IMAGES, PAIRS, LOOP_PAIRS = 100, 500, 50
# A ViT-S at stride 8 on images of 224 pixels.
GRIDS, CHANNELS = ((27, 36), (36, 27), (27, 27)), 384


def main() -> None:
    report(f"correspond, {PAIRS} pairs over {IMAGES} images", job())


def job() -> list[Row]:
    config = load_config(overrides=["model.weights=random", "features.stride=8"])
    store = _store(WORK / "correspond", config)
    pairs = _pairs_file(WORK / "pairs.csv")
    # a loop before and after, since the machine's speed drifts
    before = _loop_pairs_per_second(store, pairs)
    result = correspond.run(config, store=store.uri, name="bench", pairs=str(pairs))
    after = _loop_pairs_per_second(store, pairs)
    assert result.matched == PAIRS
    loop = (before + after) / 2
    figures = f"{result.steady_pairs_per_second:.1f} and {loop:.1f} pairs/s"
    whole = f"{result.pairs_per_second:.1f} pairs/s from the start of Ray's workers"
    read = f"{result.bytes_read / 1e6:.1f} MB of {_descriptor_bytes(store) / 1e6:.1f} MB"
    return [
        Row("job / loop that reloads", result.steady_pairs_per_second / loop, ">= 3", figures),
        Row("the same, workers' start included", result.pairs_per_second / loop, "", whole),
        Row("bytes read / descriptors' bytes", result.bytes_read / _descriptor_bytes(store), "<= 2", read),
    ]


def _store(folder: Path, config: Config) -> Store:
    """A store of smooth noise in which neighbours resemble each other, as in descriptors."""
    if folder.exists():
        shutil.rmtree(folder)
    store = Store.create(str(folder), config)
    generator = np.random.default_rng(0)
    writer = ShardWriter(store.uri, config, "bench")
    for at in range(IMAGES):
        row = {"position": at, "image_id": f"{at:03d}", "uri": "", "label": "one"}
        writer.add(row | {"source_size": 1, "source_version": "1"}, _features(generator, GRIDS[at % len(GRIDS)]))
    patches, images = writer.close()
    shard = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(store, "bench", set()).commit([shard], dict.fromkeys(writer.image_ids, (1, "1")))
    return Store.open(str(folder), config)


def _features(generator: np.random.Generator, grid: tuple[int, int]) -> ImageFeatures:
    noise = torch.from_numpy(generator.standard_normal((1, CHANNELS, *grid), dtype=np.float32))
    y, x = np.mgrid[: grid[0], : grid[1]].astype(np.float32) * 8 + 4
    return ImageFeatures(
        descriptor=F.avg_pool2d(noise, 5, stride=1, padding=2)[0].permute(1, 2, 0).contiguous().numpy(),
        extra={},
        saliency=generator.random(grid, dtype=np.float32),
        embedding=generator.standard_normal(CHANNELS).astype(np.float32),
        y=y,
        x=x,
        width=grid[1] * 8,
        height=grid[0] * 8,
        model_width=grid[1] * 8,
        model_height=grid[0] * 8,
    )


def _pairs_file(file: Path) -> Path:
    generator = np.random.default_rng(1)
    every = np.stack(np.triu_indices(IMAGES, 1), axis=1)
    chosen = every[generator.permutation(len(every))[:PAIRS]]
    file.write_text("image_a,image_b\n" + "".join(f"{a:03d},{b:03d}\n" for a, b in chosen))
    return file


def _loop_pairs_per_second(store: Store, pairs: Path) -> float:
    """Both images of a pair read from the store, matched, and the next pair; all cores."""
    files = DeltaTable(f"{store.uri}/patches").file_uris()
    chosen = pairs_of_file(str(pairs), store.images.read(["image_id"]).sort_by("image_id")["image_id"], {})
    started = time.perf_counter()
    for a, b in zip(chosen.a[:LOOP_PAIRS], chosen.b[:LOOP_PAIRS], strict=True):
        maps, saliency = zip(*(_read(files, int(image)) for image in (a, b)), strict=True)
        find_correspondences(*maps, *saliency)
    return LOOP_PAIRS / (time.perf_counter() - started)


def _read(files: list[str], image: int) -> tuple[np.ndarray, np.ndarray]:
    columns = ["image_id", "saliency", "descriptor"]
    rows = pq.read_table(files, columns=columns, filters=[("image_id", "=", f"{image:03d}")])
    grid = GRIDS[image % len(GRIDS)]
    return decode(rows, "descriptor").reshape(*grid, -1), rows["saliency"].to_numpy().reshape(grid)


def _descriptor_bytes(store: Store) -> int:
    """Stored size of the descriptors of all images."""
    total = 0
    for file in DeltaTable(f"{store.uri}/patches").file_uris():
        footer = pq.ParquetFile(file).metadata
        for group in map(footer.row_group, range(footer.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            total += sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("descriptor."))
    return total


if __name__ == "__main__":
    main()
