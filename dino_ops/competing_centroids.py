"""Which of some centroids is nearest to a vector: by a float32 product, and by a float64 one where that cannot tell.

How far apart two float32 scores must be is the a priori bound of Higham, "Accuracy and Stability of Numerical
Algorithms", section 3.1. In float64, centroids within RELATIVE_TIE of each other count as equally near, which absorbs
what the order of float64 sums leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

# The maximum is taken over strided columns first, which runs at the speed of memory.
LANES = 32
# Scores whose difference is at most this part of the product of both lengths count as equal.
RELATIVE_TIE = 1e-12
FLOAT32_ROUNDOFF = 2.0**-24
# What a product loses before it is added up, when torch may shorten its factors (set_float32_matmul_precision).
FACTOR_ROUNDOFF = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}
# A float32 product that is smaller may have been flushed to zero.
MAX_FLUSHED_PRODUCT = 1e-30


@dataclass(frozen=True)
class CompetingCentroids:
    """Centroids that compete with each other, made ready for products with vectors.

    matrix: (k, D) float64, the centroids less their mean, which changes no comparison and makes the float32 error
    smaller. bias: (k,) float64; the nearest centroid has the greatest product with the vector plus bias. first_id: the
    first centroid's. greatest_row: the greatest length of a row of matrix; greatest_length: of a centroid.
    """

    first_id: int
    matrix: torch.Tensor
    bias: torch.Tensor
    greatest_row: float
    greatest_length: float
    spherical: bool

    @classmethod
    def of(cls, centroids: torch.Tensor, first_id: int, spherical: bool) -> CompetingCentroids:
        middle = centroids.mean(dim=0)
        matrix = centroids - middle
        squared = matrix.square().sum(dim=1)
        bias = torch.zeros_like(squared) if spherical else -(matrix @ middle) - squared / 2
        length = float(torch.linalg.vector_norm(centroids, dim=1).max())
        return cls(first_id, matrix, bias, float(squared.max().sqrt()), length, spherical)

    def __len__(self) -> int:
        return len(self.matrix)

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix (k', D) and bias (k',) float32, k' a multiple of LANES; what was added never wins."""
        missing = -len(self) % LANES
        return F.pad(self.matrix.float(), (0, 0, 0, missing)), F.pad(self.bias.float(), (0, missing), value=-np.inf)

    @cached_property
    def greatest_bias(self) -> float:
        return float(self.bias.abs().max())

    def uncertainty(self, lengths: torch.Tensor) -> torch.Tensor:
        """How far apart two float32 scores must be to be certain of their order: (n,) float32.

        lengths: (n,) float32, of the vectors.
        """
        # The products, the bias, and the rounding of centroid and bias to float32.
        terms = self.matrix.shape[1] + 4
        relative = terms * FLOAT32_ROUNDOFF / (1 - terms * FLOAT32_ROUNDOFF)
        shortened = FACTOR_ROUNDOFF[torch.get_float32_matmul_precision()]
        # 1.001, because the lengths are rounded, too.
        size = lengths * self.greatest_row * 1.001 + self.greatest_bias
        return 2 * (relative + shortened) * size + self.tie(lengths) + MAX_FLUSHED_PRODUCT

    def tie(self, lengths: torch.Tensor) -> torch.Tensor:
        """The difference of scores up to which centroids count as equally near: (n,)."""
        return RELATIVE_TIE * (lengths + (0.0 if self.spherical else self.greatest_length)) * self.greatest_length

    def room(self, rows: int) -> torch.Tensor:
        """Memory for scores, (rows, k') float32, to be used again: memory fresh from the system is slow to touch."""
        matrix, _ = self.padded
        return matrix.new_empty(rows, len(matrix))

    def nearest(
        self, block: torch.Tensor, lengths: torch.Tensor, room: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best centroid by a float32 product, and whether another is too close to say: (n,) int64 and bool.

        block: (n, D) float32. lengths: (n,) float32, of the vectors. room: for at least n rows.
        """
        matrix, bias = self.padded
        products = torch.addmm(bias, block, matrix.T, out=room[: len(block)])
        scores = products.unflatten(1, (-1, LANES))  # (n, k' / LANES, LANES)
        of_lane = scores.amax(dim=1)
        best, lane = of_lane.max(dim=1, keepdim=True)
        in_lane = scores.gather(2, lane[:, :, None].expand(-1, scores.shape[1], 1)).squeeze(2)
        row = in_lane.argmax(dim=1, keepdim=True)
        second = torch.maximum(
            of_lane.scatter_(1, lane, -np.inf).amax(dim=1), in_lane.scatter_(1, row, -np.inf).amax(dim=1)
        )
        close = second >= best.squeeze(1) - self.uncertainty(lengths)
        return (row * LANES + lane).squeeze(1), close

    def nearest_exactly(self, block: torch.Tensor) -> torch.Tensor:
        """The best centroid of rows (n, D) float64, and the lowest of those that are equally near: (n,) int64."""
        scores = torch.addmm(self.bias, block, self.matrix.T)
        tie = self.tie(torch.linalg.vector_norm(block, dim=1))
        return (scores >= (scores.amax(dim=1) - tie)[:, None]).to(torch.uint8).argmax(dim=1)
