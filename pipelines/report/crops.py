"""Pieces of photos around a patch, cut at full size while the photo is in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from PIL import Image

from pipelines.report.clusterings import Clustering
from pipelines.report.patches import Box, ImagePatches
from pipelines.report.photos import jpeg

CROP_SIDE_PIXELS = 96
MIN_PATCHES_ACROSS = 3
# A smaller part of the photo is not recognised.
MIN_SHARE_OF_PHOTO_SIDE = 0.18

# image_id, row and column of the stored grid
Place = tuple[str, int, int]


@dataclass(frozen=True)
class Crop:
    """A square piece of a photo, CROP_SIDE_PIXELS wide, and the box of its patch in it."""

    jpeg: bytes
    mark: Box


class Crops:
    """Cuts the crops that clusterings ask for; every photo is passed to `look`."""

    def __init__(
        self, clusterings: Iterable[Clustering], most_clusters: int, patches: Mapping[str, ImagePatches]
    ) -> None:
        self.found: dict[Place, Crop] = {}
        self._patches = patches
        self._wanted: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for clustering in clusterings:
            for cluster in clustering.ranked[:most_clusters]:
                for one in clustering.typical.get(cluster, ()):
                    if one.row is not None and one.col is not None and one.image_id in patches:
                        self._wanted[one.image_id].add((one.row, one.col))

    def look(self, image_id: str, picture: Image.Image) -> None:
        for row, col in self._wanted.get(image_id, ()):
            self.found[image_id, row, col] = _cut(picture, self._patches[image_id], row, col)


def _cut(picture: Image.Image, patches: ImagePatches, row: int, col: int) -> Crop:
    left, top, _, _ = patches.place
    height, width = (size / patches.step for size in patches.cell)
    x, y = left + (col + 0.5) * width, top + (row + 0.5) * height
    side = min(max(MIN_PATCHES_ACROSS * max(width, height), MIN_SHARE_OF_PHOTO_SIDE * min(picture.size)), *picture.size)
    x0 = min(max(x - side / 2, 0), picture.width - side)
    y0 = min(max(y - side / 2, 0), picture.height - side)
    piece = picture.resize(
        (CROP_SIDE_PIXELS, CROP_SIDE_PIXELS), Image.Resampling.LANCZOS, box=(x0, y0, x0 + side, y0 + side)
    )
    scale = CROP_SIDE_PIXELS / side
    mark = ((x - width / 2 - x0) * scale, (y - height / 2 - y0) * scale, width * scale, height * scale)
    return Crop(jpeg(piece), mark)
