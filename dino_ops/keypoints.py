"""Key points carried from one image to another by the similarity of patches.

The protocol of the published code's author (ShirAmir/dino-vit-features, issue 8): a key point becomes the patch whose
centre is nearest, that patch's nearest neighbour in the other image is found, and the answer is its centre.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dino_ops.descriptors import Array, binned_similarity_at, float_tensor


def nearest_patches(points_xy: np.ndarray, centres_y: np.ndarray, centres_x: np.ndarray) -> np.ndarray:
    """The patch whose centre is nearest to each point, as a cell in raster order: (n,) int64.

    points_xy: (n, 2) pixels, x first. centres_y, centres_x: (grid height, grid width) pixels of the same image.
    """
    grid_width = centres_y.shape[1]
    # centres form a grid, so each axis has its own nearest line
    row = np.abs(points_xy[:, 1, None] - centres_y[:, 0]).argmin(axis=1)
    column = np.abs(points_xy[:, 0, None] - centres_x[0]).argmin(axis=1)
    return row * grid_width + column


def transfer_cells(map_a: Array, cells: np.ndarray, map_b: Array, *, binned: bool = True) -> np.ndarray:
    """The most similar cell of map_b, by cosine, for some cells of map_a: (n,) int64, raster order.

    map_a, map_b: descriptors (grid height, grid width, C), floating point, not binned. cells: (n,) integers, raster
    order. Of equals the first is taken. Memory grows with n times the cells of map_b.
    """
    if len(cells) == 0:
        return np.zeros(0, np.int64)
    if binned:
        similarity = torch.as_tensor(binned_similarity_at(map_a, cells, map_b))
    else:
        a, b = (float_tensor(one).flatten(0, 1) for one in (map_a, map_b))
        chosen = a[torch.as_tensor(np.array(cells), device=a.device)]
        similarity = F.normalize(chosen, dim=1) @ F.normalize(b, dim=1).T
    return similarity.argmax(dim=1).cpu().numpy()


def transfer_points(
    points_xy: np.ndarray,
    map_a: Array,
    centres_a: tuple[np.ndarray, np.ndarray],
    map_b: Array,
    centres_b: tuple[np.ndarray, np.ndarray],
    *,
    binned: bool = True,
) -> np.ndarray:
    """Where points of image a lie in image b: (n, 2) float64, x and y in pixels of image b.

    points_xy: (n, 2) pixels of image a, x first. map_a, map_b: see transfer_cells. centres_a, centres_b: the patches'
    centres (y, x), each (grid height, grid width), in pixels of the respective image.
    """
    found = transfer_cells(map_a, nearest_patches(points_xy, *centres_a), map_b, binned=binned)
    y, x = (axis.ravel()[found] for axis in centres_b)
    return np.stack([x, y], axis=1).astype(np.float64)
