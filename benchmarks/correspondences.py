"""Correspondences of one pair of images against the published procedure and against the matrix products they contain.

make bench        (this part: about a minute)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.results import Row, report
from dino_ops.correspondences import find_correspondences

# A ViT-S at stride 4 on images of 375 x 224 and 269 x 224 pixels.
GRID_A, GRID_B, CHANNELS = (53, 90), (53, 64), 384


def main() -> None:
    report("correspondences of one pair, descriptors ready", one_pair())


def one_pair() -> list[Row]:
    """A 224-pixel pair at stride 4, binned."""
    generator = np.random.default_rng(0)
    a, b = (_smooth(generator, grid) for grid in (GRID_A, GRID_B))
    saliency_a, saliency_b = (generator.random(grid, dtype=np.float32) for grid in (GRID_A, GRID_B))
    flat_a, flat_b = (torch.from_numpy(m).flatten(0, 1) for m in (a, b))

    def ours() -> object:
        return find_correspondences(a, b, saliency_a, saliency_b)

    def two_products() -> object:
        return flat_a @ flat_b.T, flat_a @ flat_b.T

    ours()
    pairs = [(_seconds(ours), _seconds(two_products)) for _ in range(5)]
    seconds = statistics.median(pair[0] for pair in pairs)
    published = _published_seconds(a, b)
    return [
        Row("published procedure / ours", published / seconds, ">= 200", f"{published:,.0f} s and {seconds:.2f} s"),
        Row("ours / two bare matrix products", statistics.median(x / y for x, y in pairs), "<= 8", "median of 5"),
    ]


def _smooth(generator: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """Noise in which neighbours resemble each other, as in descriptors: (height, width, CHANNELS) float32."""
    noise = torch.from_numpy(generator.standard_normal((1, CHANNELS, *grid), dtype=np.float32))
    return F.avg_pool2d(noise, 5, stride=1, padding=2)[0].permute(1, 2, 0).contiguous().numpy()


def _published_seconds(a: np.ndarray, b: np.ndarray) -> float:
    """Seconds of the published procedure: a loop over every location's 17 bins, then cosine similarity row by row.

    Parts of both loops are timed and scaled to their lengths: the whole takes many minutes.
    """
    locations, rows = 200, 20
    count_a, count_b = a.shape[0] * a.shape[1], b.shape[0] * b.shape[1]
    maps = [torch.from_numpy(m).permute(2, 0, 1)[None] for m in (a, b)]
    binning = _seconds(lambda: _bin_locations(maps[0], locations)) / locations * (count_a + count_b)
    wide_a = torch.randn(rows, 17 * CHANNELS)
    wide_b = torch.randn(count_b, 17 * CHANNELS)
    cosine = _seconds(lambda: [torch.cosine_similarity(row[None], wide_b, dim=1) for row in wide_a]) / rows * count_a
    return binning + cosine


def _bin_locations(feature_map: torch.Tensor, locations: int) -> torch.Tensor:
    """Log-binned descriptors of the first locations, one small assignment for every bin."""
    _, channels, height, width = feature_map.shape
    levels = [feature_map, F.avg_pool2d(feature_map, 3, stride=1, padding=1, count_include_pad=False)]
    binned = torch.zeros(1, 17 * channels, height, width)
    for location in range(locations):
        y, x = divmod(location, width)
        part = 0
        for level, pooled in enumerate(levels):
            reach = 3**level
            for row in (y - reach, y, y + reach):
                for column in (x - reach, x, x + reach):
                    if level > 0 and (row, column) == (y, x):
                        continue
                    at = (min(max(row, 0), height - 1), min(max(column, 0), width - 1))
                    binned[:, part : part + channels, y, x] = pooled[:, :, at[0], at[1]]
                    part += channels
    return binned


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
