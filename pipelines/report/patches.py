"""The patches of the images of a report, as grids; of a fine grid every n-th row and column."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.settings.sections import ReportSettings
from pipelines.store.rows import rows_of
from pipelines.store.schemas import scale_column
from pipelines.store.store import Store
from pipelines.store.vectors import decode

# left, top, width, height
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ImagePatches:
    """Patches of one image.

    saliency: (rows, columns) float32 of the stored grid, NaN where nothing is stored; None where the store has none.
    place: the box of the stored grid in pixels of the original.
    descriptor: (gh, gw, D) float16 of the thinned grid. stored: (gh, gw), which of them there are.
    y, x: (gh,) and (gw,) float64, their centres in pixels of the original. cell: (height, width) of one of them, there.
    step: every step-th row and column is left. origin: the first of these rows and columns.
    """

    saliency: np.ndarray | None
    place: Box
    descriptor: np.ndarray
    stored: np.ndarray
    y: np.ndarray
    x: np.ndarray
    cell: tuple[float, float]
    step: int
    origin: tuple[int, int]

    @property
    def thinned_place(self) -> Box:
        """The thinned grid's place in pixels of the original."""
        height, width = self.cell
        return self.x[0] - width / 2, self.y[0] - height / 2, width * len(self.x), height * len(self.y)


def read_patches(store: Store, images: pa.Table, settings: ReportSettings) -> dict[str, ImagePatches]:
    """Patches by image_id, of those images that have any stored.

    images: COLUMNS of pipelines.report.choose.

    Raises RequestError for a descriptor that the store does not have.
    """
    column = settings.descriptor
    if store.config.store.patches == "none":
        return {}
    store.requires("a report", descriptor=("report.descriptor", column))
    wanted = ["image_id", "row", "col", "y", "x", "saliency", column]
    if scale_column(column) in store.patches.schema.names:
        wanted.append(scale_column(column))
    about = {row["image_id"]: row for row in images.drop_columns(["embedding"]).to_pylist()}
    by_shard: dict[str, list[str]] = defaultdict(list)
    for image_id, row in about.items():
        if row["shard"]:
            by_shard[row["shard"]].append(image_id)
    found = {}
    for shard, ids in by_shard.items():
        rows = rows_of(store.patches, ids, wanted, [shard])
        order = rows["image_id"].combine_chunks()
        stretches = pc.run_end_encode(order if isinstance(order, pa.Array) else order.chunk(0))
        first = 0
        for image_id, end in zip(stretches.values.to_pylist(), stretches.run_ends.to_pylist(), strict=True):
            found[image_id] = _of_image(rows.slice(first, end - first), column, about[image_id], settings)
            first = end
    return found


def _of_image(rows: pa.Table, column: str, about: dict[str, int], settings: ReportSettings) -> ImagePatches:
    grid = about["grid_height"], about["grid_width"]
    row, col = rows["row"].to_numpy(), rows["col"].to_numpy()
    y, cell_height = _centres(row, rows["y"].to_numpy(), grid[0], about["height"])
    x, cell_width = _centres(col, rows["x"].to_numpy(), grid[1], about["width"])
    saliency = None
    if rows["saliency"].null_count < len(rows):
        saliency = np.full(grid, np.nan, np.float32)
        saliency[row, col] = rows["saliency"].to_numpy(zero_copy_only=False)
    step = 1
    while -(-grid[0] // step) * -(-grid[1] // step) > settings.most_patches:
        step += 1
    origin = tuple(min(step // 2, (size - 1) % step) for size in grid)
    thinned = tuple(len(range(start, size, step)) for start, size in zip(origin, grid, strict=True))
    kept = (row % step == origin[0]) & (col % step == origin[1])
    vectors = decode(rows.filter(pa.array(kept)), column).astype(np.float16)
    at = (row[kept] - origin[0]) // step, (col[kept] - origin[1]) // step
    descriptor = np.zeros((*thinned, vectors.shape[1]), np.float16)
    stored = np.zeros(thinned, bool)
    descriptor[at], stored[at] = vectors, True
    return ImagePatches(
        saliency=saliency,
        place=(x[0] - cell_width / 2, y[0] - cell_height / 2, cell_width * grid[1], cell_height * grid[0]),
        descriptor=descriptor,
        stored=stored,
        y=y[origin[0] :: step],
        x=x[origin[1] :: step],
        cell=(cell_height * step, cell_width * step),
        step=step,
        origin=(origin[0], origin[1]),
    )


def _centres(index: np.ndarray, centre: np.ndarray, count: int, extent: int) -> tuple[np.ndarray, float]:
    """Centres of all rows (or columns) from those of some, and how far one is from the next."""
    first, last = index.argmin(), index.argmax()
    apart = int(index[last] - index[first])
    step = float(centre[last] - centre[first]) / apart if apart else extent / count
    return float(centre[first]) + (np.arange(count) - index[first]) * step, step
