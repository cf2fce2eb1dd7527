"""Point correspondences between two images: which patch matches which, and a few of them that are spread out.

"Deep ViT Features as Dense Visual Descriptors", section 4.3: best buddies of binned descriptors in the foreground of
both images, clustered, and the most salient of each cluster. Cells of a map are counted in raster order.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from dino_ops.descriptors import Array, binned_similarity_blocks, log_bin_at

ForegroundRule = Literal["reference", "strict"]

BLOCK_VALUES = 16_000_000  # of a similarity matrix held at once


@dataclass(frozen=True)
class NearestNeighbours:
    """The most similar cell of the other map for every cell of two maps with n_a and n_b cells.

    b_of_a, similarity_a: (n_a,) int64 and float32. a_of_b, similarity_b: (n_b,). Of equals the first is taken.
    """

    b_of_a: np.ndarray
    similarity_a: np.ndarray
    a_of_b: np.ndarray
    similarity_b: np.ndarray

    def mutual(self) -> np.ndarray:
        """Cells of a whose neighbour has them as its own neighbour ("best buddies"), ascending: (m,) int64."""
        cells = np.arange(len(self.b_of_a))
        return cells[self.a_of_b[self.b_of_a] == cells]


@dataclass(frozen=True)
class Correspondences:
    """Matched patches of two images.

    cell_a, cell_b: (m,) int64, ascending in cell_a. similarity: (m,) float32, cosine. saliency: (m,) float32, the mean
    of both patches' saliency. selected: (k,) int64, the rows that spread out over the object, most salient first.
    mutual: how many mutual neighbours there were before the foreground's rule.
    """

    cell_a: np.ndarray
    cell_b: np.ndarray
    similarity: np.ndarray
    saliency: np.ndarray
    selected: np.ndarray
    mutual: int

    def __len__(self) -> int:
        return len(self.cell_a)


def find_correspondences(
    map_a: Array,
    map_b: Array,
    saliency_a: np.ndarray,
    saliency_b: np.ndarray,
    *,
    num_pairs: int = 10,
    saliency_threshold: float = 0.05,
    binned: bool = True,
    foreground: ForegroundRule = "reference",
    seed: int = 0,
) -> Correspondences:
    """Best buddies in the foreground of both images, and the num_pairs of them that spread out over the object.

    map_a, map_b: descriptors (grid height, grid width, C) of any floating-point type, not binned; tensors may lie on a
    GPU. saliency_a, saliency_b: (grid height, grid width), 0..1. foreground: see `in_foreground`. seed: of k-means.

    Without mutual neighbours in the foreground the result is empty.
    """
    neighbours = nearest_neighbours(map_a, map_b, binned=binned)
    salient_a, salient_b = np.asarray(saliency_a).ravel(), np.asarray(saliency_b).ravel()
    mutual = cell_a = neighbours.mutual()
    kept = in_foreground(neighbours, salient_a > saliency_threshold, salient_b > saliency_threshold, foreground)
    cell_a = cell_a[kept[cell_a]]
    cell_b = neighbours.b_of_a[cell_a]
    saliency = ((salient_a[cell_a] + salient_b[cell_b]) / 2).astype(np.float32)
    points = paired_descriptors(map_a, map_b, cell_a, cell_b, binned=binned)
    return Correspondences(
        cell_a,
        cell_b,
        similarity=neighbours.similarity_a[cell_a],
        saliency=saliency,
        selected=spread_out(points, saliency, num_pairs, seed),
        mutual=len(mutual),
    )


def nearest_neighbours(map_a: Array, map_b: Array, *, binned: bool = True) -> NearestNeighbours:
    """Nearest neighbours by cosine similarity in both directions, of binned descriptors or of plain ones.

    map_a, map_b: (grid height, grid width, C). The similarity matrix is computed in blocks and never held whole, so
    memory is bounded for grids of any size.
    """
    blocks = binned_similarity_blocks(map_a, map_b) if binned else _similarity_blocks(map_a, map_b)
    b_of_a, similarity_a = [], []
    a_of_b = similarity_b = torch.empty(0)
    for first, block in blocks:
        similarity = torch.as_tensor(block)
        best, at = similarity.max(dim=1)
        similarity_a.append(best)
        b_of_a.append(at)
        best, at = similarity.max(dim=0)
        if first == 0:
            a_of_b, similarity_b = at, best
        else:
            better = best > similarity_b  # not >=: the first of equals stays
            a_of_b = torch.where(better, at + first, a_of_b)
            similarity_b = torch.where(better, best, similarity_b)
    return NearestNeighbours(
        b_of_a=_numpy(torch.cat(b_of_a)),
        similarity_a=_numpy(torch.cat(similarity_a)),
        a_of_b=_numpy(a_of_b),
        similarity_b=_numpy(similarity_b),
    )


def in_foreground(
    neighbours: NearestNeighbours, foreground_a: np.ndarray, foreground_b: np.ndarray, rule: ForegroundRule
) -> np.ndarray:
    """Cells of a that count as foreground of both images: (n_a,) bool.

    foreground_a: (n_a,) bool, foreground_b: (n_b,) bool. `strict` asks that a cell and its neighbour are foreground.
    `reference` is the published code's rule: any foreground cell of b whose neighbour the cell is will do.
    """
    if rule == "strict":
        return foreground_a & foreground_b[neighbours.b_of_a]
    chosen = np.zeros(len(foreground_a), bool)
    chosen[neighbours.a_of_b[foreground_b]] = True
    return foreground_a & chosen


def paired_descriptors(
    map_a: Array, map_b: Array, cell_a: np.ndarray, cell_b: np.ndarray, *, binned: bool
) -> np.ndarray:
    """The descriptors of matched cells, joined and brought to unit length: (m, 2 * D) float32."""
    parts = []
    for feature_map, cells in ((map_a, cell_a), (map_b, cell_b)):
        if binned:
            parts.append(torch.as_tensor(log_bin_at(feature_map, cells)))
        else:
            flat = torch.as_tensor(feature_map).flatten(0, 1)
            parts.append(flat[torch.as_tensor(cells, device=flat.device)].float())
    return _numpy(F.normalize(torch.cat(parts, dim=1), dim=1))


def spread_out(points: np.ndarray, saliency: np.ndarray, num_pairs: int, seed: int = 0) -> np.ndarray:
    """Rows of points, one of each of num_pairs k-means clusters: the most salient; (k,) int64, most salient first.

    points: (m, D) of unit length. saliency: (m,). k is the smaller of m and num_pairs; 0 for no points.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    k = min(num_pairs, len(points))
    if k == 0:
        return np.zeros(0, np.int64)
    # n_init: the default of the scikit-learn that the published code was written for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters are no mistake
        labels = KMeans(k, n_init=10, random_state=seed).fit_predict(_isometric(points))
    # a stable sort: of equals the first is the cluster's representative
    by_saliency = np.argsort(-saliency, kind="stable")
    _, first = np.unique(labels[by_saliency], return_index=True)
    return by_saliency[np.sort(first)]


def _isometric(points: np.ndarray) -> np.ndarray:
    """The same points in as few dimensions as there are points: distances, all that k-means sees, are the same."""
    if points.shape[1] <= len(points):
        return points
    gram = points.astype(np.float64)
    gram = gram @ gram.T
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(np.maximum(values, 0))


def _similarity_blocks(map_a: Array, map_b: Array) -> Iterator[tuple[int, torch.Tensor]]:
    """Cosine similarity of plain descriptors: (first cell of a, (cells of the block, cells of b))."""
    a, b = (F.normalize(torch.as_tensor(m).flatten(0, 1).float(), dim=1, eps=1e-8) for m in (map_a, map_b))
    rows = max(1, BLOCK_VALUES // len(b))
    for first in range(0, len(a), rows):
        yield first, a[first : first + rows] @ b.T


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
