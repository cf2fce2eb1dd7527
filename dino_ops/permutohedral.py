"""Sums over all pairs of many points with Gaussian weights, in time linear in their number.

Adams, Baek, Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (2010): values are spread onto the
corners of the simplices that points lie in, blurred along the lattice's axes, and read back. An approximation, and the
one that implementations of dense CRFs use.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import sparse


class PermutohedralFilter:
    """Sums of values over all points, weighted by exp(-|f_i - f_j|^2 / 2) up to a constant factor.

    features: (n, d), of any scale; n >= 1. Building takes some 100 * d bytes a point.
    """

    def __init__(self, features: np.ndarray) -> None:
        base, rank, weights = _enclosing_simplices(_onto_hyperplane(np.asarray(features, np.float64)))
        count, axes = base.shape  # axes = d + 1
        corner = np.arange(axes)[:, None]
        # corner r of the simplex is r steps along the axes of lowest rank, each step making all coordinates equal to
        # one another modulo d + 1
        steps = np.where(np.arange(axes) <= axes - 1 - corner, corner, corner - axes)
        corners = base[:, None, :] + steps[:, rank].transpose(1, 0, 2)  # (n, d + 1 corners, d + 1)
        encode = _Encoding(corners.reshape(-1, axes))
        codes, vertex = np.unique(encode(corners.reshape(-1, axes)), return_inverse=True)
        self._splat = sparse.csr_array(
            (weights.ravel().astype(np.float32), (vertex.ravel(), np.repeat(np.arange(count), axes))),
            shape=(len(codes), count),
        )
        self._slice = self._splat.T.tocsr()
        vertices = encode.decode(codes)
        self._blurs = [_blur(axis, vertices, codes, encode) for axis in range(axes)]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Filtered values (n, channels) float32, of values (n, channels)."""
        lattice = self._splat @ values.astype(np.float32)
        for blur in self._blurs:
            lattice = blur @ lattice
        return self._slice @ lattice


class _Encoding:
    """Points of the lattice as one integer each, so that they can be sorted and found."""

    def __init__(self, points: np.ndarray) -> None:
        self.axes = points.shape[1]
        # all coordinates are equal modulo d + 1 and add up to 0: the remainder and all but one quotient say it all
        quotients = points[:, :-1] // self.axes
        self.low = quotients.min(axis=0) - 2  # neighbours lie at most one step outside
        self.spans = [int(span) for span in quotients.max(axis=0) + 3 - self.low]
        if math.prod(self.spans) * self.axes >= 2**63:
            raise ValueError("the features reach too far for this filter: use larger standard deviations")

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """(m, d + 1) integers -> (m,) int64."""
        quotients, remainders = points[:, :-1] // self.axes - self.low, points[:, 0] % self.axes
        code = remainders
        for axis, span in enumerate(self.spans):
            code = code * span + quotients[:, axis]
        return code

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The points again: (m,) int64 -> (m, d + 1) int64."""
        quotients = np.empty((len(codes), len(self.spans)), np.int64)
        for axis in reversed(range(len(self.spans))):
            codes, quotients[:, axis] = np.divmod(codes, self.spans[axis])
        points = (quotients + self.low) * self.axes + codes[:, None]
        return np.concatenate([points, -points.sum(axis=1, keepdims=True)], axis=1)


def _onto_hyperplane(features: np.ndarray) -> np.ndarray:
    """Features (n, d) in the hyperplane of d + 1 coordinates that add up to 0, where the lattice lies."""
    dimensions = features.shape[1]
    # blurring once along each axis has a standard deviation of (d + 1) * sqrt(2 / 3)
    scale = (dimensions + 1) * math.sqrt(2 / 3) / np.sqrt(np.arange(1, dimensions + 1) * np.arange(2, dimensions + 2))
    scaled = features * scale
    tails = np.concatenate([scaled[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((len(features), 1))], axis=1)
    elevated = tails.copy()  # coordinate j: what comes after feature j - 1, less j times that feature
    elevated[:, 1:] -= np.arange(1, dimensions + 1) * scaled
    return elevated


def _enclosing_simplices(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The simplex around each point: its corner of remainder 0 (n, d + 1) int64, the ranks of the point's coordinates
    relative to it (n, d + 1), and the weights of its corners by remainder (n, d + 1).
    """
    count, axes = points.shape
    base = np.rint(points / axes).astype(np.int64)
    excess = base.sum(axis=1)
    difference = points - base * axes
    # ranks: 0 for the largest difference
    order = np.argsort(-difference, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(axes), (count, axes)), axis=1)
    # rounding each coordinate on its own may leave the hyperplane: move the coordinates that were rounded most
    rank += excess[:, None]
    base += (rank < 0).astype(np.int64) - (rank >= axes)
    rank %= axes
    remainder = (points - base * axes) / axes
    by_rank = np.empty_like(remainder)
    np.put_along_axis(by_rank, rank, remainder, axis=1)  # descending
    weights = np.empty_like(by_rank)
    weights[:, 0] = 1 - (by_rank[:, 0] - by_rank[:, -1])
    weights[:, 1:] = (by_rank[:, :-1] - by_rank[:, 1:])[:, ::-1]
    return base * axes, rank, weights


def _blur(axis: int, vertices: np.ndarray, codes: np.ndarray, encode: _Encoding) -> sparse.csr_array:
    """Each vertex plus half of its two neighbours along an axis of the lattice, where they exist: (m, m) sparse."""
    count = len(codes)
    rows, columns, values = [np.arange(count)], [np.arange(count)], [np.ones(count, np.float32)]
    for direction in (1, -1):
        neighbours = vertices + direction
        neighbours[:, axis] -= direction * vertices.shape[1]
        wanted = encode(neighbours)
        at = np.minimum(np.searchsorted(codes, wanted), count - 1)
        exists = np.flatnonzero(codes[at] == wanted)
        rows.append(exists)
        columns.append(at[exists])
        values.append(np.full(len(exists), 0.5, np.float32))
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_array(entries, shape=(count, count))
