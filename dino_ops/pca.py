"""Principal components of descriptors: fitting, projecting, and colours to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ROWS_AT_A_TIME = 16_384


@dataclass(frozen=True)
class PCA:
    """A fitted projection of D channels to k components.

    mean (D,), components (k, D) with orthonormal rows, explained_variance (k,) in falling order; float64. The sign of
    each component is such that its entry of largest magnitude is positive.
    """

    mean: np.ndarray
    components: np.ndarray
    explained_variance: np.ndarray

    def transform(self, rows: np.ndarray) -> np.ndarray:
        """Rows (..., D) -> (..., k) float32."""
        components = self.components.astype(np.float32)
        offset = (self.components @ self.mean).astype(np.float32)
        return rows.astype(np.float32, copy=False) @ components.T - offset

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, as np.savez and PCA.from_arrays take them."""
        return {"mean": self.mean, "components": self.components, "explained_variance": self.explained_variance}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> PCA:
        return cls(arrays["mean"], arrays["components"], arrays["explained_variance"])


def fit_pca(rows: np.ndarray, k: int, seed: int = 0, max_rows: int | None = None) -> PCA:
    """Fit k principal components to rows (n, D) of any floating-point type.

    max_rows: fit to a random sample of this many rows, drawn with `seed`; None uses all. Sums are float64, so the
    result does not depend on the order of the rows beyond rounding.

    Raises ValueError unless 1 <= k <= min(n, D).
    """
    if max_rows is not None and len(rows) > max_rows:
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), max_rows, replace=False))]
    n, dimensions = rows.shape
    if not 1 <= k <= min(n, dimensions):
        raise ValueError(
            f"{k} components of {n} rows with {dimensions} channels: k goes from 1 to {min(n, dimensions)}"
        )
    mean = rows.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((dimensions, dimensions))
    for start in range(0, n, _ROWS_AT_A_TIME):
        centred = rows[start : start + _ROWS_AT_A_TIME].astype(np.float64) - mean
        scatter += centred.T @ centred
    variance, vectors = np.linalg.eigh(scatter / max(n - 1, 1))  # ascending
    components = vectors[:, ::-1][:, :k].T
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(k), largest])[:, None]
    return PCA(mean, np.ascontiguousarray(components), np.maximum(variance[::-1][:k], 0))


def pca_colours(maps: Sequence[np.ndarray], shared_range: bool = False) -> list[np.ndarray]:
    """Colour maps (gh, gw, D) of one or several images so that like parts look alike: each (gh, gw, 3) uint8.

    Four components are fitted to all maps together; the first mostly tells foreground from background, the other
    three become red, green and blue. Each channel is stretched to 0..255 for each image by itself, as the reference
    does, or over all images with shared_range.
    """
    if not maps:
        return []
    rows = np.concatenate([feature_map.reshape(-1, feature_map.shape[-1]) for feature_map in maps])
    pca = fit_pca(rows, k=4)
    projected = [pca.transform(feature_map)[..., 1:] for feature_map in maps]
    if shared_range:
        everything = np.concatenate([colours.reshape(-1, 3) for colours in projected])
        return [_stretched(colours, everything) for colours in projected]
    return [_stretched(colours, colours.reshape(-1, 3)) for colours in projected]


def _stretched(colours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    low, high = reference.min(axis=0), reference.max(axis=0)
    span = np.where(high > low, high - low, 1)
    return np.rint((colours - low) / span * 255).astype(np.uint8)
