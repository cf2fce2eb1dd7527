"""Descriptors made small enough to travel in a page: fewer dimensions, a byte for each, nearly the same cosines.

Everything after `compact_descriptors` is whole numbers until the last two products, so that a program in another
language which does the same gets the same similarities to the last bit (pipelines/report/page/live.js does).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# With the 127 steps of a code and 512 dimensions, sums of products stay below 2 ** 31.
REGION_QUERY_STEPS = 32_767
MAX_DIMENSIONS = 512
_ROWS_AT_A_TIME = 16_384


@dataclass(frozen=True)
class CompactDescriptors:
    """n descriptors in d dimensions.

    codes: (n, d) int8; only their direction counts; zeros for a descriptor of length zero. kept: the share of the
    squared length of unit descriptors that lies in the d dimensions, 0..1.
    """

    codes: np.ndarray
    kept: float


def compact_descriptors(rows: np.ndarray, dimensions: int, seed: int = 0, max_rows: int = 65_536) -> CompactDescriptors:
    """Codes of descriptors (n, D) of any floating-point type, in min(dimensions, D) dimensions.

    The dimensions are the leading eigenvectors of the unit descriptors' second moments: principal components without
    taking away the mean, since cosines are to be kept and not distances from a mean. They are fitted to a random sample
    of max_rows, drawn with `seed`. Each descriptor is scaled by its own largest value to -127..127. No rows give
    (0, d) codes.

    Raises ValueError unless 1 <= dimensions <= 512.
    """
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions: there can be 1 to {MAX_DIMENSIONS}")
    count, channels = rows.shape
    kept_dimensions = min(dimensions, channels)
    if not count:
        return CompactDescriptors(np.zeros((0, kept_dimensions), np.int8), 1.0)
    sample = rows
    if count > max_rows:
        sample = rows[np.sort(np.random.default_rng(seed).choice(count, max_rows, replace=False))]
    moments = np.zeros((channels, channels))
    for start in range(0, len(sample), _ROWS_AT_A_TIME):
        unit = _unit(sample[start : start + _ROWS_AT_A_TIME]).astype(np.float64)
        moments += unit.T @ unit
    shares, vectors = np.linalg.eigh(moments)  # ascending
    basis = np.ascontiguousarray(vectors[:, ::-1][:, :kept_dimensions])
    codes = np.empty((count, kept_dimensions), np.int8)
    for start in range(0, count, _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        codes[part] = _scaled(_unit(rows[part]) @ basis, 127)
    whole = shares.sum()
    return CompactDescriptors(codes, float(shares[::-1][:kept_dimensions].sum() / whole) if whole > 0 else 1.0)


def region_query(codes: np.ndarray) -> np.ndarray:
    """The query (d,) int32 of a region, codes (m, d) int8: one patch as it is, several as the mean of their directions.

    Raises ValueError for no patches.
    """
    if not len(codes):
        raise ValueError("a region has at least one patch")
    if len(codes) == 1:
        return codes[0].astype(np.int32)
    total = np.zeros(codes.shape[1])
    # Row by row, as the page's program adds them: another order could change the last bits.
    for row, length in zip(codes.astype(np.float64), inverse_lengths(codes), strict=True):
        total += row * length
    return _scaled(total[None], REGION_QUERY_STEPS)[0].astype(np.int32)


def cosines(codes: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosine of each of the codes (n, d) with a query (d,) of `region_query`: (n,) float64; 0 for those of length 0."""
    # These sums of whole numbers are exact, since they stay below 2 ** 53.
    products = codes.astype(np.float64) @ query.astype(np.float64)
    return products * inverse_lengths(codes) * inverse_lengths(query[None])[0]


def inverse_lengths(rows: np.ndarray) -> np.ndarray:
    """One over the Euclidean length of rows of whole numbers (n, d): (n,) float64; 0 for those of length 0."""
    whole = rows.astype(np.float64)
    squares = np.einsum("nd,nd->n", whole, whole)
    return np.divide(1.0, np.sqrt(squares), out=np.zeros(len(rows)), where=squares > 0)


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _scaled(rows: np.ndarray, steps: int) -> np.ndarray:
    """Rows of numbers as whole ones, the largest of each row being `steps`; halves go up, as Math.round has them."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    return np.floor(np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0) * steps + 0.5)
