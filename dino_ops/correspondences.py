"""Point correspondences between two images: which patch matches which, and a few of them that are spread out.

"Deep ViT Features as Dense Visual Descriptors", section 4.3: best buddies of binned descriptors in the foreground of
both images, clustered, and the most salient of each cluster. Cells of a map are counted in raster order.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from dino_ops.descriptors import MAX_SIMILARITY_BLOCK_VALUES, Array, binned_similarity_tiles, bins_at, float_tensor

ForegroundRule = Literal["reference", "strict"]

# Joined descriptors of matches that hold more values are projected before k-means.
MAX_CLUSTERED_VALUES = 32_000_000
# Enough to keep squared distances to within some 6 %.
PROJECTED_DIMENSIONS = 512


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

    Without mutual neighbours in the foreground, or without cells, the result is empty. Values of descriptors that are
    not finite count as 0. Where more than MAX_CLUSTERED_VALUES values would be clustered (2,400 matches of binned
    descriptors of 384 dimensions), a random projection of them is.

    Raises ValueError for maps that are not two grids of vectors of one length, or saliency of another grid.
    """
    _check_maps(map_a, map_b, saliency_a, saliency_b)
    if 0 in (*map_a.shape[:2], *map_b.shape[:2]):
        nothing, none = np.zeros(0, np.int64), np.zeros(0, np.float32)
        return Correspondences(nothing, nothing, none, none, nothing, 0)
    a, b = _finite(map_a), _finite(map_b)
    neighbours = nearest_neighbours(a, b, binned=binned)
    salient_a, salient_b = np.asarray(saliency_a).ravel(), np.asarray(saliency_b).ravel()
    mutual = neighbours.mutual()
    kept = in_foreground(neighbours, salient_a > saliency_threshold, salient_b > saliency_threshold, foreground)
    cell_a = mutual[kept[mutual]]
    cell_b = neighbours.b_of_a[cell_a]
    saliency = ((salient_a[cell_a] + salient_b[cell_b]) / 2).astype(np.float32)
    values = len(cell_a) * 2 * map_a.shape[-1] * (17 if binned else 1)
    joined = paired_descriptors if values <= MAX_CLUSTERED_VALUES else projected_descriptors
    points = joined(a, b, cell_a, cell_b, binned=binned)
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

    map_a, map_b: (grid height, grid width, C), finite, with at least one cell. The similarity matrix is computed in
    tiles and never held whole, so memory is bounded for grids of any size.
    """
    count_a, count_b = (one.shape[0] * one.shape[1] for one in (map_a, map_b))
    if not count_a or not count_b:
        raise ValueError(f"Neighbours need at least one cell; the maps are {_shape(map_a)} and {_shape(map_b)}.")
    tiles = binned_similarity_tiles(map_a, map_b) if binned else _similarity_tiles(map_a, map_b)
    of_a = of_b = None
    for first_a, first_b, tile in tiles:
        similarity = torch.as_tensor(tile)
        of_a, of_b = of_a or _Nearest(count_a, similarity), of_b or _Nearest(count_b, similarity)
        of_a.see(first_a, first_b, *similarity.max(dim=1))
        of_b.see(first_b, first_a, *similarity.max(dim=0))
    assert of_a is not None and of_b is not None
    return NearestNeighbours(*map(_numpy, (of_a.neighbour, of_a.similarity, of_b.neighbour, of_b.similarity)))


class _Nearest:
    """The most similar cell of the other map for every cell of one, as far as tiles were seen."""

    def __init__(self, cells: int, like: torch.Tensor) -> None:
        self.similarity = like.new_full((cells,), -torch.inf)
        self.neighbour = torch.zeros(cells, dtype=torch.int64, device=like.device)

    def see(self, first: int, first_of_other: int, best: torch.Tensor, at: torch.Tensor) -> None:
        """Take the best of a tile that begins with cells `first` and `first_of_other` where they are better."""
        seen = slice(first, first + len(best))
        # Not >=: tiles come in order, and the first of equals stays.
        better = best > self.similarity[seen]
        self.neighbour[seen] = torch.where(better, at + first_of_other, self.neighbour[seen])
        self.similarity[seen] = torch.where(better, best, self.similarity[seen])


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
    parts = [*_parts_at(map_a, cell_a, binned), *_parts_at(map_b, cell_b, binned)]
    return _numpy(F.normalize(torch.cat(parts, dim=1), dim=1).float())


def projected_descriptors(
    map_a: Array, map_b: Array, cell_a: np.ndarray, cell_b: np.ndarray, *, binned: bool
) -> np.ndarray:
    """paired_descriptors in PROJECTED_DIMENSIONS, never held whole: (m, PROJECTED_DIMENSIONS) float32.

    A random projection keeps distances (Johnson and Lindenstrauss); it is the same for every call.
    """
    generator = torch.Generator().manual_seed(0)
    projected = squares = torch.zeros(())
    for part in itertools.chain(_parts_at(map_a, cell_a, binned), _parts_at(map_b, cell_b, binned)):
        directions = torch.randn(part.shape[1], PROJECTED_DIMENSIONS, generator=generator).to(part)
        projected = projected.to(part) + part @ directions
        squares = squares.to(part) + part.square().sum(dim=1, keepdim=True)
    return _numpy((projected / (squares * PROJECTED_DIMENSIONS).sqrt().clamp_min(1e-12)).float())


def _parts_at(feature_map: Array, cells: np.ndarray, binned: bool) -> Iterator[torch.Tensor]:
    """Descriptors of cells, part after part: (m, C) each."""
    tensor = float_tensor(feature_map)
    if binned:
        yield from bins_at(tensor, cells)
    else:
        yield tensor.flatten(0, 1)[torch.as_tensor(np.array(cells), device=tensor.device)]


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
        # Fewer different points than clusters are no mistake.
        warnings.simplefilter("ignore", ConvergenceWarning)
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


def _similarity_tiles(map_a: Array, map_b: Array) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Cosine similarity of plain descriptors, as binned_similarity_tiles yields it; a tile holds all cells of b."""
    tensors = [float_tensor(one).flatten(0, 1) for one in (map_a, map_b)]
    kind = torch.promote_types(*(one.dtype for one in tensors))
    a, b = (F.normalize(one.to(kind), dim=1, eps=1e-8) for one in tensors)
    rows = max(1, MAX_SIMILARITY_BLOCK_VALUES // len(b))
    for first in range(0, len(a), rows):
        yield first, 0, a[first : first + rows] @ b.T


def _finite(feature_map: Array) -> torch.Tensor:
    tensor = float_tensor(feature_map)
    return tensor if tensor.isfinite().all() else tensor.nan_to_num(0.0, 0.0, 0.0)


def _check_maps(map_a: Array, map_b: Array, saliency_a: np.ndarray, saliency_b: np.ndarray) -> None:
    if map_a.ndim != 3 or map_b.ndim != 3 or map_a.shape[2] != map_b.shape[2]:
        raise ValueError(
            f"The maps are {_shape(map_a)} and {_shape(map_b)}: they should be (grid height, grid width, channels), "
            "with as many channels each."
        )
    for feature_map, saliency in ((map_a, saliency_a), (map_b, saliency_b)):
        height, width = feature_map.shape[:2]
        if np.shape(saliency) not in ((height, width), (height * width,)):
            raise ValueError(f"Saliency is {np.shape(saliency)} for a map of {_shape(feature_map)}: give its grid.")


def _shape(array: Array) -> str:
    return " x ".join(map(str, array.shape))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
