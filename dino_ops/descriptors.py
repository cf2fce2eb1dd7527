"""Descriptors made of facets: channel orders, log-binned context, and exact similarity of binned descriptors.

"Deep ViT Features as Dense Visual Descriptors", section 3 (log-binning of the descriptors' surroundings).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

ChannelOrder = Literal["head_major", "dim_major"]

Array = TypeVar("Array", np.ndarray, torch.Tensor)

MAX_SIMILARITY_BLOCK_VALUES = 16_000_000
# With fewer, most of the work would be repeated at the block's edges.
MIN_BLOCK_GRID_ROWS = 4


def order_channels(projected: torch.Tensor, num_heads: int, order: ChannelOrder) -> torch.Tensor:
    """Channels (..., heads * dims) of a key, query or value facet in another order.

    head_major is the model's own: the channels of a head are neighbours. dim_major is that of the reference
    implementation: the head is the fastest index. Distances and cosines are the same.
    """
    if order == "head_major":
        return projected
    return projected.unflatten(-1, (num_heads, -1)).transpose(-1, -2).flatten(-2)


def log_bin(feature_map: Array, hierarchy: int = 2) -> Array:
    """Every cell's descriptor joined by those around it, averaged more coarsely the farther away.

    feature_map: (grid height, grid width, C) or (B, grid height, grid width, C), floating point, tensor or array.
    Returns the same kind with (1 + 8 * hierarchy) * C channels, bin after bin: the 3 x 3 neighbours in raster order,
    then for each level k >= 1 the eight at distance 3**k, of averages over 3**k x 3**k cells. Outside the grid the
    border repeats. Half-precision input gives float32.
    """
    tensor = float_tensor(feature_map)
    batched = tensor if tensor.ndim == 4 else tensor[None]
    bins = []
    for level in range(hierarchy):
        reach = 3**level
        pooled = _padded(_average(batched, level), reach)
        height, width = batched.shape[1:3]
        for y in (0, reach, 2 * reach):
            for x in (0, reach, 2 * reach):
                if level == 0 or (y, x) != (reach, reach):
                    bins.append(pooled[:, y : y + height, x : x + width])
    binned = torch.cat(bins, dim=-1)
    return _like(feature_map, binned if tensor.ndim == 4 else binned[0])


def log_bin_at(feature_map: Array, cells: np.ndarray, hierarchy: int = 2) -> Array:
    """Rows of log_bin at some cells alone: (len(cells), (1 + 8 * hierarchy) * C).

    feature_map: (grid height, grid width, C). cells: (n,) integers, raster order.
    """
    return _like(feature_map, torch.cat(list(bins_at(float_tensor(feature_map), cells, hierarchy)), dim=-1))


def bins_at(feature_map: torch.Tensor, cells: np.ndarray, hierarchy: int = 2) -> Iterator[torch.Tensor]:
    """Yield the parts of log_bin_at, bin after bin: (len(cells), C) each, so that the whole need not be held."""
    height, width = feature_map.shape[:2]
    y, x = (torch.as_tensor(axis, device=feature_map.device) for axis in np.divmod(np.asarray(cells, np.int64), width))
    for level in range(hierarchy):
        reach = 3**level
        pooled = _average(feature_map[None], level)[0]
        for dy in (-reach, 0, reach):
            for dx in (-reach, 0, reach):
                if level == 0 or (dy, dx) != (0, 0):
                    yield pooled[(y + dy).clamp(0, height - 1), (x + dx).clamp(0, width - 1)]


def binned_similarity(map_a: Array, map_b: Array, hierarchy: int = 2, block_rows: int | None = None) -> Array:
    """Cosine similarity of every binned descriptor of map_a with every one of map_b: (cells of a, cells of b).

    map_a, map_b: (grid height, grid width, C), not binned; cells in raster order. Equals normalising log_bin of both
    and multiplying, at a ninth of the arithmetic and none of the memory. float32 (float64 if given that).
    See binned_similarity_blocks, which also explains block_rows, for results too large to hold.
    """
    blocks = [block for _, block in binned_similarity_blocks(map_a, map_b, hierarchy, block_rows)]
    return _like(map_a, torch.cat([float_tensor(block) for block in blocks]))


def binned_similarity_at(map_a: Array, cells: np.ndarray, map_b: Array, hierarchy: int = 2) -> Array:
    """Rows of binned_similarity at some cells of map_a alone: (len(cells), cells of b).

    cells: (n,) integers, raster order. For few cells cheaper than whole blocks: each bin is one thin product with the
    averaged map_b, which is then looked up at b's own neighbours. Binned descriptors of map_b are never made.
    """
    a, b = float_tensor(map_a), float_tensor(map_b)
    height, width, channels = b.shape
    queries = log_bin_at(a, cells, hierarchy).unflatten(-1, (-1, channels))  # (n, bins, C)
    y, x = torch.arange(height, device=b.device), torch.arange(width, device=b.device)
    dots = b.new_zeros(len(queries), height, width)
    used = 0
    for level in range(hierarchy):
        reach = 3**level
        averaged = _average(b[None], level)[0]
        for dy in (-reach, 0, reach):
            for dx in (-reach, 0, reach):
                if level == 0 or (dy, dx) != (0, 0):
                    of_bin = torch.einsum("nc,yxc->nyx", queries[:, used], averaged)
                    dots += of_bin[:, (y + dy).clamp(0, height - 1)][:, :, (x + dx).clamp(0, width - 1)]
                    used += 1
    norm_a = queries.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-8)
    norm_b = _binned_norm(b, hierarchy).flatten()
    return _like(map_a, dots.flatten(1) / norm_a / norm_b)


def binned_similarity_blocks(
    map_a: Array, map_b: Array, hierarchy: int = 2, block_rows: int | None = None
) -> Iterator[tuple[int, Array]]:
    """Yield (first cell of a, similarity (cells of the block, cells of b)) over blocks of grid rows of map_a.

    block_rows: grid rows of map_a at a time; None keeps a block's arrays near 16 million values, but takes four rows
    at least. Fewer rows take less memory and repeat more work at the blocks' edges.
    """
    height_b, width_b = map_b.shape[:2]
    rows = block_rows or max(MIN_BLOCK_GRID_ROWS, MAX_SIMILARITY_BLOCK_VALUES // (map_a.shape[1] * height_b * width_b))
    for first, _, block in binned_similarity_tiles(map_a, map_b, hierarchy, (rows, height_b)):
        yield first, block


def binned_similarity_tiles(
    map_a: Array, map_b: Array, hierarchy: int = 2, tile_rows: tuple[int, int] | None = None
) -> Iterator[tuple[int, int, Array]]:
    """Yield (first cell of a, first cell of b, similarity (cells of a, cells of b)) over tiles, row by row of tiles.

    tile_rows: grid rows of map_a and of map_b; None keeps a tile's arrays near 16 million values for grids of any
    height, and of up to 1,000 columns. Of small grids a tile holds all of map_b.

    A binned descriptor is a concatenation, so its dot product is a sum of dot products of cells, and those of all
    cells are one small matrix per level: shifting that matrix along both maps at once and adding gives the whole.
    """
    a, b = float_tensor(map_a), float_tensor(map_b)
    a, b = a.to(torch.promote_types(a.dtype, b.dtype)), b.to(torch.promote_types(a.dtype, b.dtype))
    (height_a, width_a), (height_b, width_b) = a.shape[:2], b.shape[:2]
    most_a, most_b = tile_rows or _tile_rows(width_a, height_b, width_b)
    norm_a, norm_b = _binned_norm(a, hierarchy), _binned_norm(b, hierarchy)
    levels = []
    for level in range(hierarchy):
        reach = 3**level
        levels.append((reach, _padded(_average(a[None], level), reach)[0], _padded(_average(b[None], level), reach)[0]))
    for top_a, top_b in itertools.product(range(0, height_a, most_a), range(0, height_b, most_b)):
        rows_a, rows_b = min(most_a, height_a - top_a), min(most_b, height_b - top_b)
        dots = a.new_zeros(rows_a, width_a, rows_b, width_b)
        for level, (reach, padded_a, padded_b) in enumerate(levels):
            strip_a = padded_a[top_a : top_a + rows_a + 2 * reach]
            strip_b = padded_b[top_b : top_b + rows_b + 2 * reach]
            _add_level(dots, strip_a, strip_b, reach, skip_centre=level > 0)
        block = dots.flatten(2).flatten(0, 1)
        block /= norm_a[top_a : top_a + rows_a].reshape(-1, 1)
        block /= norm_b[top_b : top_b + rows_b].flatten()
        yield top_a * width_a, top_b * width_b, _like(map_a, block)


def _tile_rows(width_a: int, height_b: int, width_b: int) -> tuple[int, int]:
    """Grid rows of both maps in a tile: all of b where that leaves enough rows of a, else a square."""
    rows = MAX_SIMILARITY_BLOCK_VALUES // (width_a * height_b * width_b)
    if rows >= MIN_BLOCK_GRID_ROWS:
        return rows, height_b
    side = max(MIN_BLOCK_GRID_ROWS, math.isqrt(MAX_SIMILARITY_BLOCK_VALUES // (width_a * width_b)))
    return side, side


def _add_level(dots: torch.Tensor, a: torch.Tensor, b: torch.Tensor, reach: int, skip_centre: bool) -> None:
    """Add one level's dot products to dots (rows, width of a, height of b, width of b); a and b are padded by reach.

    The nine offsets are all pairs of three vertical and three horizontal ones, so summing over one axis and then the
    other takes six additions instead of nine.
    """
    rows, width_a, height_b, width_b = dots.shape
    similarity = torch.einsum("yxc,vuc->yxvu", a, b)
    if skip_centre:
        dots -= similarity[
            reach : reach + rows, reach : reach + width_a, reach : reach + height_b, reach : reach + width_b
        ]
    across = similarity[:, :width_a, :, :width_b].clone()
    for x in (reach, 2 * reach):
        across += similarity[:, x : x + width_a, :, x : x + width_b]
    for y in (0, reach, 2 * reach):
        dots += across[y : y + rows, :, y : y + height_b]


def _binned_norm(feature_map: torch.Tensor, hierarchy: int, eps: float = 1e-8) -> torch.Tensor:
    """L2 norm of every binned descriptor, (grid height, grid width), at least eps."""
    height, width = feature_map.shape[:2]
    total = feature_map.new_zeros(height, width)
    for level in range(hierarchy):
        reach = 3**level
        squares = _average(feature_map[None], level).square().sum(dim=-1, keepdim=True)
        padded = _padded(squares, reach)[0, :, :, 0]
        for y in (0, reach, 2 * reach):
            for x in (0, reach, 2 * reach):
                if level == 0 or (y, x) != (reach, reach):
                    total += padded[y : y + height, x : x + width]
    return total.sqrt().clamp_min(eps)


def _average(maps: torch.Tensor, level: int) -> torch.Tensor:
    """(B, height, width, C) averaged over 3**level x 3**level cells; cells outside the grid do not count."""
    if level == 0:
        return maps
    window = 3**level
    pooled = F.avg_pool2d(
        maps.permute(0, 3, 1, 2), window, stride=1, padding=window // 2, count_include_pad=False
    )  # (B, C, height, width)
    return pooled.permute(0, 2, 3, 1)


def _padded(maps: torch.Tensor, reach: int) -> torch.Tensor:
    """(B, height, width, C) with its border repeated `reach` times on every side."""
    return F.pad(maps.permute(0, 3, 1, 2), (reach, reach, reach, reach), mode="replicate").permute(0, 2, 3, 1)


def float_tensor(array: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The same values as a float32 tensor, or float64 where they are; memory is shared where it can be."""
    if isinstance(array, np.ndarray):
        # torch warns of read-only arrays, such as columns of Arrow tables, and refuses reversed ones
        usable = array.flags.writeable and min(array.strides, default=0) >= 0
        array = torch.from_numpy(array if usable else array.copy())
    return array if array.dtype == torch.float64 else array.float()


def _like(example: Array, result: torch.Tensor) -> Array:
    return result.cpu().numpy() if isinstance(example, np.ndarray) else result
