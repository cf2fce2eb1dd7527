"""The part of k-means that sees every vector: its nearest centroid, and the sums from which centroids are updated.

Spherical means by direction: vectors count as if they had length 1, centroids have length 1, the distance is
1 - cosine and so is a vector's inertia. A zero vector has cosine 0 with every centroid. Otherwise the distance is
Euclidean and the inertia its square. Of equally near centroids the one with the lowest id is taken.

The result does not depend on how rows are cut into blocks or spread over workers. Products are float32, whose last
bits change with the shape of a block; where the best two centroids are closer than float32 can tell, the row is
decided again in float64 (see `competing_centroids`).

Vectors and centroids are tensors on any device or arrays; work happens on the device of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dino_ops.competing_centroids import CompetingCentroids

Vectors = np.ndarray | torch.Tensor

# 4 MiB of scores, so that a block stays in the cache.
CPU_SCORE_BLOCK_VALUES = 2**20
GPU_SCORE_BLOCK_VALUES = 2**26
CPU_MIN_MAX_BLOCK_ROWS = 64, 4_096
GPU_MIN_MAX_BLOCK_ROWS = 256, 2**18
CPU_FLOAT64_BLOCK_VALUES = 400_000
GPU_FLOAT64_BLOCK_VALUES = 2**25
# After each chunk, the rows that were too close are decided again in float64.
BLOCKS_PER_CHUNK = 32


@dataclass(frozen=True)
class PartialSums:
    """What k clusters hold of some vectors: all that travels between workers. Parts are merged by addition.

    sums: (k, D) float64, the members' sum, of unit length each when spherical. sizes: (k,) int64. inertia: (k,)
    float64.
    """

    sums: np.ndarray
    sizes: np.ndarray
    inertia: np.ndarray

    @classmethod
    def zeros(cls, k: int, dimension: int) -> PartialSums:
        return cls(np.zeros((k, dimension)), np.zeros(k, np.int64), np.zeros(k))

    def __add__(self, other: PartialSums) -> PartialSums:
        return PartialSums(self.sums + other.sums, self.sizes + other.sizes, self.inertia + other.inertia)


class Codebook:
    """Centroids made ready for a device, so that many pieces of data can be compared with them.

    centroids: (k, D) float64 master copies, unit length when spherical. offsets: (parents + 1,) int64 or None: for
    hierarchical clusters, centroids offsets[p]:offsets[p + 1] are those that vectors of parent p are compared with.
    """

    def __init__(
        self,
        centroids: Vectors,
        *,
        spherical: bool,
        offsets: Vectors | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.spherical = spherical
        self.centroids = as_tensor(centroids).to(device, torch.float64)
        if self.centroids.ndim != 2:
            raise ValueError(f"centroids have two axes (k, D), not {self.centroids.ndim}")
        self.offsets = np.array([0, len(self)]) if offsets is None else np.asarray(offsets, np.int64)
        if self.offsets[0] != 0 or self.offsets[-1] != len(self) or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets rise from 0 to the number of centroids, {len(self)}; these do not")
        self.hierarchical = offsets is not None
        self._ranges: dict[int, CompetingCentroids] = {}

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def dimension(self) -> int:
        return self.centroids.shape[1]

    def assign(
        self, vectors: Vectors, parents: Vectors | None = None, *, block_rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the function `assign`."""
        labels, distances = [], []
        for rows, label in self._labelled(vectors, parents, block_rows):
            labels.append(_Placed(rows, label))
            distances.append(_Placed(rows, self._distances(vectors, rows, label, block_rows)))
        return self._joined(labels, len(vectors), torch.int64), self._joined(distances, len(vectors), torch.float32)

    def _labelled(
        self, vectors: Vectors, parents: Vectors | None, block_rows: int | None
    ) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Chunks of rows and their labels (n,) int64."""
        self._check(vectors, parents)
        for parent, rows in self._groups(len(vectors), parents):
            competing = self._range(parent)
            size = block_rows or _block_rows(len(competing), self.centroids.device)
            for chunk in _cut(rows, size * BLOCKS_PER_CHUNK):
                yield chunk, self._nearest(competing, vectors, chunk, size) + competing.first_id

    def _nearest(self, competing: CompetingCentroids, vectors: Vectors, chunk: Rows, block_rows: int) -> torch.Tensor:
        parts, doubts, lengths = [], [], []
        room = competing.room(min(block_rows, _count(chunk)))
        for rows in _cut(chunk, block_rows):
            block = self._take(vectors, rows).float()
            length = torch.linalg.vector_norm(block, dim=1)
            label, close = competing.nearest(block, length, room)
            parts.append(label)
            doubts.append(close)
            lengths.append(length)
        if not torch.isfinite(torch.cat(lengths)).all():
            raise ValueError("vectors to cluster must be finite and below 1e18; some are nan, infinite or greater")
        labels = torch.cat(parts)
        close_rows = torch.cat(doubts).nonzero().squeeze(1)
        for again in close_rows.split(max(1, block_rows // 2)):
            block = float64(self._take(vectors, _at(chunk, again)))
            labels[again] = competing.nearest_exactly(block)
        return labels

    def _distances(self, vectors: Vectors, chunk: Rows, labels: torch.Tensor, block_rows: int | None) -> torch.Tensor:
        """To the centroids of their labels, computed in float64 since differences of squares would not do: (n,)."""
        size = block_rows or self._float64_rows()
        parts = []
        for rows, label in zip(_cut(chunk, size), labels.split(size), strict=True):
            block, nearest = float64(self._take(vectors, rows)), self.centroids[label]
            if self.spherical:
                parts.append((1 - (unit(block) * nearest).sum(dim=1)).clamp_min(0))
            else:
                parts.append(torch.linalg.vector_norm(block - nearest, dim=1))
        return torch.cat(parts).float()

    def _groups(self, count: int, parents: Vectors | None) -> Iterator[tuple[int, Rows]]:
        """Parents and the rows of each."""
        if not self.hierarchical:
            if count:
                yield 0, slice(0, count)
            return
        held = as_tensor(parents if parents is not None else np.zeros(0)).to(self.centroids.device, torch.int64)
        order = torch.argsort(held, stable=True)
        sizes = torch.bincount(held, minlength=1)
        for parent, rows in enumerate(order.split(sizes.tolist())):
            if len(rows):
                yield parent, rows

    def _range(self, parent: int) -> CompetingCentroids:
        if parent not in self._ranges:
            first, last = self.offsets[parent : parent + 2].tolist()
            self._ranges[parent] = CompetingCentroids.of(self.centroids[first:last], first, self.spherical)
        return self._ranges[parent]

    def _take(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        """Some rows on the device."""
        if isinstance(vectors, np.ndarray) and isinstance(rows, torch.Tensor):
            return as_tensor(vectors[rows.cpu().numpy()]).to(self.centroids.device)
        return as_tensor(vectors[rows]).to(self.centroids.device)

    def _float64_rows(self) -> int:
        on_cpu = self.centroids.device.type == "cpu"
        return max(1, (CPU_FLOAT64_BLOCK_VALUES if on_cpu else GPU_FLOAT64_BLOCK_VALUES) // max(1, self.dimension))

    def _joined(self, parts: list[_Placed], count: int, dtype: torch.dtype) -> torch.Tensor:
        joined = torch.empty(count, dtype=dtype, device=self.centroids.device)
        for part in parts:
            joined[part.rows] = part.values
        return joined

    def _check(self, vectors: Vectors, parents: Vectors | None) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise ValueError(f"vectors have the shape {tuple(vectors.shape)}; centroids have {self.dimension} values")
        if self.hierarchical != (parents is not None):
            raise ValueError("parents and offsets belong together: give both or neither")
        if not len(vectors):
            return
        if parents is None:
            if not len(self):
                raise ValueError(f"{len(vectors)} vectors were given, but there are no centroids")
            return
        if len(parents) != len(vectors):
            raise ValueError(f"{len(vectors)} vectors have {len(parents)} parents: give one for each")
        given = np.unique(as_tensor(parents).cpu().numpy())
        if given[0] < 0 or given[-1] >= len(self.offsets) - 1:
            raise ValueError(f"parents are 0 to {len(self.offsets) - 2}, but {given[0]} to {given[-1]} were given")
        childless = given[np.diff(self.offsets)[given] == 0]
        if len(childless):
            raise ValueError(f"vectors belong to parent {childless[0]}, which has no centroids")


class LloydPass:
    """One pass over the data: sums of all vectors added so far, under the clusters nearest to them."""

    def __init__(self, codebook: Codebook) -> None:
        self.codebook = codebook
        device, k = codebook.centroids.device, len(codebook)
        self._sums = torch.zeros_like(codebook.centroids)
        self._sizes = torch.zeros(k, dtype=torch.int64, device=device)
        self._squared_lengths = torch.zeros(k, dtype=torch.float64, device=device)

    def add(self, vectors: Vectors, parents: Vectors | None = None, *, block_rows: int | None = None) -> torch.Tensor:
        """Labels (n,) int64 of vectors (n, D) that are added to the sums."""
        codebook, labels = self.codebook, []
        for rows, label in codebook._labelled(vectors, parents, block_rows):
            labels.append(_Placed(rows, label))
            self.add_labelled(vectors, rows, label, block_rows)
        return codebook._joined(labels, len(vectors), torch.int64)

    def add_labelled(self, vectors: Vectors, chunk: Rows, labels: torch.Tensor, block_rows: int | None = None) -> None:
        """Rows of vectors whose clusters are known."""
        codebook = self.codebook
        size = block_rows or codebook._float64_rows()
        self._sizes += torch.bincount(labels, minlength=len(codebook))
        for rows, label in zip(_cut(chunk, size), labels.split(size), strict=True):
            block = float64(codebook._take(vectors, rows))
            if codebook.spherical:
                block = unit(block)
            else:
                self._squared_lengths.index_add_(0, label, block.square().sum(dim=1))
            self._sums.index_add_(0, label, block)

    def total(self) -> PartialSums:
        """Of all that was added. The inertia follows from the sums: no vector is looked at again."""
        centroids = self.codebook.centroids
        towards = (self._sums * centroids).sum(dim=1)
        if self.codebook.spherical:
            inertia = self._sizes - towards
        else:
            inertia = self._squared_lengths - 2 * towards + self._sizes * centroids.square().sum(dim=1)
        parts = (self._sums, self._sizes, inertia.clamp_min(0))
        return PartialSums(*(part.cpu().numpy() for part in parts))


def assign(
    vectors: Vectors,
    centroids: Vectors | Codebook,
    *,
    spherical: bool,
    parents: Vectors | None = None,
    offsets: Vectors | None = None,
    block_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centroid of every vector: labels (n,) int64 and distances (n,) float32.

    vectors: (n, D) float16, bfloat16 or float32. centroids: (k, D) float64, or a Codebook of them. parents: (n,)
    integers, with offsets (parents + 1,) as in Codebook. block_rows: of products; the result does not depend on it.
    """
    return _codebook(centroids, vectors, spherical, offsets).assign(vectors, parents, block_rows=block_rows)


def assign_and_sum(
    vectors: Vectors,
    centroids: Vectors | Codebook,
    *,
    spherical: bool,
    parents: Vectors | None = None,
    offsets: Vectors | None = None,
    block_rows: int | None = None,
) -> PartialSums:
    """One step of Lloyd's for some vectors: their sums by nearest centroid.

    Arguments as of `assign`. Data in several pieces is better added to one LloydPass, which also says the labels.
    """
    lloyd = LloydPass(_codebook(centroids, vectors, spherical, offsets))
    lloyd.add(vectors, parents, block_rows=block_rows)
    return lloyd.total()


def partial_sums(vectors: Vectors, labels: Vectors, distances: Vectors, k: int, *, spherical: bool) -> PartialSums:
    """Sums of vectors (n, D) whose clusters and distances are known, as `assign` returns them."""
    device = vectors.device if isinstance(vectors, torch.Tensor) else torch.device("cpu")
    lloyd = LloydPass(Codebook(np.zeros((k, vectors.shape[1])), spherical=spherical, device=device))
    held = as_tensor(labels).to(device, torch.int64)
    lloyd.add_labelled(vectors, slice(0, len(vectors)), held)
    apart = as_tensor(distances).to(device, torch.float64)
    inertia = torch.bincount(held, apart if spherical else apart.square(), minlength=k).double()
    total = lloyd.total()
    return PartialSums(total.sums, total.sizes, inertia.cpu().numpy())


def unit(block: torch.Tensor) -> torch.Tensor:
    """Rows at length 1; zero rows stay zero."""
    lengths = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return block * torch.where(lengths > 0, lengths.reciprocal(), 0.0)


def float64(block: torch.Tensor) -> torch.Tensor:
    """Half precision by way of float32: torch's direct conversion takes twice as long."""
    return block.float().double() if block.dtype in (torch.float16, torch.bfloat16) else block.double()


def as_tensor(array: Vectors) -> torch.Tensor:
    """Without a copy where torch allows: it does not take arrays that must not be written to."""
    if isinstance(array, torch.Tensor):
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())


# A run of rows, or their numbers.
Rows = slice | torch.Tensor


@dataclass(frozen=True)
class _Placed:
    """Values of some rows."""

    rows: Rows
    values: torch.Tensor


def _cut(rows: Rows, size: int) -> Iterator[Rows]:
    if isinstance(rows, torch.Tensor):
        yield from rows.split(size)
        return
    for first in range(rows.start, rows.stop, size):
        yield slice(first, min(first + size, rows.stop))


def _count(rows: Rows) -> int:
    return len(rows) if isinstance(rows, torch.Tensor) else rows.stop - rows.start


def _at(rows: Rows, positions: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows at some positions."""
    return rows[positions] if isinstance(rows, torch.Tensor) else positions + rows.start


def _block_rows(k: int, device: torch.device) -> int:
    on_cpu = device.type == "cpu"
    least, most = CPU_MIN_MAX_BLOCK_ROWS if on_cpu else GPU_MIN_MAX_BLOCK_ROWS
    return min(most, max(least, (CPU_SCORE_BLOCK_VALUES if on_cpu else GPU_SCORE_BLOCK_VALUES) // k))


def _codebook(centroids: Vectors | Codebook, vectors: Vectors, spherical: bool, offsets: Vectors | None) -> Codebook:
    if isinstance(centroids, Codebook):
        return centroids
    device = vectors.device if isinstance(vectors, torch.Tensor) else "cpu"
    return Codebook(centroids, spherical=spherical, offsets=offsets, device=device)
