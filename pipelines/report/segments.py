"""The foreground and parts of the images of a report, at the size of its photos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.results.masks import read_png
from pipelines.results.parts import PartTables
from pipelines.store.rows import rows_of


@dataclass(frozen=True)
class Segment:
    """What co-segmentation found in an image.

    parts: (H, W) part_id + 1, 0 = background. foreground: (H, W) bool. note: what was unusual, or "".
    """

    set_id: str
    parts: np.ndarray
    foreground: np.ndarray
    note: str


def read_segments(tables: PartTables, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Segment]:
    """Masks by image_id; for an image that is in several sets those of the first set.

    sizes: (width, height) in pixels that the masks are brought to, by image_id.
    """
    columns = ["image_id", "set_id", "mask_png", "foreground_png", "note"]
    rows = rows_of(tables.images, sizes, columns).sort_by([("image_id", "ascending"), ("set_id", "ascending")])
    found: dict[str, Segment] = {}
    for row in rows.to_pylist():
        if row["image_id"] in found:
            continue
        parts, foreground = (
            np.asarray(Image.fromarray(read_png(row[name])).resize(sizes[row["image_id"]], Image.Resampling.NEAREST))
            for name in ("mask_png", "foreground_png")
        )
        found[row["image_id"]] = Segment(row["set_id"], parts, foreground > 0, row["note"] or "")
    return found
