"""Sets of images with an object of two parts before a background of two kinds: stores of them, and where they are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hand_made import described
from PIL import Image

from dino_ops.extractor import ImageFeatures
from pipelines.extract.shards import ShardWriter
from pipelines.store.extraction import Committer, ShardReport
from pipelines.store.store import Store

GRID = 12
PATCH_PIXELS = 6
COLOURS = np.array([[200, 40, 40], [40, 60, 200], [90, 160, 90], [220, 220, 180]], np.uint8)


@dataclass(frozen=True)
class Scene:
    """One image. kinds: the grid, 0 and 1 for the object's parts, 2 and 3 for background."""

    kinds: np.ndarray
    features: ImageFeatures

    @property
    def picture(self) -> Image.Image:
        return Image.fromarray(COLOURS[self.kinds].repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1))


def scene(seed: int, *, empty: bool = False, size: int = GRID) -> Scene:
    generator = np.random.default_rng(seed)
    kinds = np.where(np.arange(size)[:, None] < size // 2, 2, 3) * np.ones((1, size), int)
    top, left = generator.integers(1, max(size // 2, 2), 2)
    if not empty:
        kinds[top : top + 4, left : left + 3] = 0
        kinds[top : top + 4, left + 3 : left + 5] = 1
    directions = np.eye(8, dtype=np.float32)[kinds] + 0.05 * generator.standard_normal((size, size, 8))
    descriptor = directions * generator.uniform(1, 9, (size, size, 1))
    saliency = np.where(kinds < 2, 0.5, 0.02) + generator.uniform(0, 0.02, kinds.shape)
    made = described(descriptor, saliency)
    side = size * PATCH_PIXELS
    sizes = dict.fromkeys(("width", "height", "model_width", "model_height"), side)
    return Scene(kinds, dataclasses.replace(made, **sizes))


def add_scenes(
    store: Store,
    run: int,
    scenes: dict[str, Scene],
    pictures: Path | None = None,
    version: str = "v1",
    uris: dict[str, str] | None = None,
) -> None:
    """Commit one shard of images; their label is their folder, none at the top. Older rows of the same images go.

    pictures: a folder that files of them are written to; or uris, where they are already.
    """
    run_id = f"2020010{run}T000000Z-00000{run}"
    writer, versions = ShardWriter(store.uri, store.config, run_id), {}
    for at, image_id in enumerate(sorted(scenes)):
        folder = image_id.rpartition("/")[0]
        file, size = Path("/nowhere", image_id.replace("/", "_")), 10
        if pictures:
            file = pictures / f"{run}-{at}.png"
            scenes[image_id].picture.save(file)
            size = file.stat().st_size
        facts = {"label": folder.rpartition("/")[2] or None, "source_size": size, "source_version": version}
        writer.add(
            {"position": at, "image_id": image_id, "uri": (uris or {}).get(image_id, str(file)), **facts},
            scenes[image_id].features,
        )
        versions[image_id] = (size, version)
    patches, images = writer.close()
    report = ShardReport("shard", writer.positions, writer.image_ids, patches, images)
    Committer(store, run_id, set(scenes)).commit([report], versions)
