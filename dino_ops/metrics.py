"""Numbers that say how good features are: PCK of key points, recall and mean average precision of retrieval.

The same name stands for several numbers in the literature. Here each convention is a function or a field of its own,
so that a result can say which one it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Ranking takes some 40 bytes for each similarity.
MAX_RANKED_BLOCK_VALUES = 4_000_000


@dataclass(frozen=True)
class PCK:
    """Percentage of correct key points, as fractions 0..1, one for each alpha: (alphas,) float64.

    per_pair: the mean over pairs of the fraction of a pair's points that are correct (SPair-71k calls it per image).
    per_point: the fraction of all points that are correct; pairs with many points weigh more.
    """

    per_pair: np.ndarray
    per_point: np.ndarray


def pck(errors: np.ndarray, lengths: np.ndarray, pairs: np.ndarray, alphas: Sequence[float]) -> PCK:
    """PCK: a point is correct when its error is at most alpha times a length of the target image.

    errors: (n,) distances in pixels of the target image. lengths: (n,) pixels, what each point's threshold is a part
    of: image_side, box_side or keypoint_box_side. pairs: (n,) integers, the pair of images that a point belongs to.
    Without points all is nan.
    """
    if len(errors) == 0:
        nothing = np.full(len(alphas), np.nan)
        return PCK(nothing, nothing)
    correct = errors[:, None] <= np.asarray(alphas, np.float64) * lengths[:, None]  # (n, alphas)
    _, pair, points = np.unique(pairs, return_inverse=True, return_counts=True)
    of_pair = np.zeros((len(points), len(alphas)))
    np.add.at(of_pair, pair, correct)
    return PCK(per_pair=(of_pair / points[:, None]).mean(axis=0), per_point=correct.mean(axis=0))


def image_side(height: int, width: int) -> float:
    """The longer side of the target image, pixels."""
    return float(max(height, width))


def box_side(box_xyxy: Sequence[float]) -> float:
    """The longer side of the target object's annotated box (x0, y0, x1, y1), pixels: SPair-71k's threshold."""
    x0, y0, x1, y1 = box_xyxy
    return float(max(x1 - x0, y1 - y0))


def keypoint_box_side(points_xy: np.ndarray) -> float:
    """The longer side of the box around the target's key points (n, 2), pixels: for data without boxes."""
    return float(np.ptp(points_xy, axis=0).max())


@dataclass(frozen=True)
class Retrieval:
    """How often the neighbours of an image have its label; every image is a query against all others.

    recall: k -> fraction of queries with at least one image of their label among the k nearest (as in metric
    learning; not the fraction of all relevant images found). mean_average_precision: over whole rankings.
    queries: images that count. alone: images whose label no other has; they have nothing to find and do not count,
    but are in everyone's ranking. Without queries all values are nan.
    """

    recall: dict[int, float]
    mean_average_precision: float
    queries: int
    alone: int


def retrieval_by_label(
    embeddings: np.ndarray, labels: Sequence[object], ks: Sequence[int] = (1, 5, 10), block_rows: int | None = None
) -> Retrieval:
    """Rank all other images by cosine for every image, exactly, and see where those of its label stand.

    embeddings: (n, D) floating point; a vector of zeros, or that is not finite, has cosine 0 with all
    others. labels: n values that compare.
    Ranked in blocks of block_rows queries, so that memory is bounded; of equal similarities the earlier image comes
    first.
    """
    _, label = np.unique(np.asarray(labels), return_inverse=True)
    others = np.bincount(label, minlength=1)[label] - 1 if len(label) else np.zeros(0, np.int64)
    found = {k: 0 for k in ks}
    precision = 0.0
    for relevant in _rankings(embeddings, label, block_rows):
        for k in ks:
            found[k] += int(relevant[:, :k].any(axis=1).sum())
        precision += float(average_precision(relevant).sum())
    queries = int((others > 0).sum())
    return Retrieval(
        recall={k: count / queries if queries else float("nan") for k, count in found.items()},
        mean_average_precision=precision / queries if queries else float("nan"),
        queries=queries,
        alone=len(label) - queries,
    )


def average_precision(relevant: np.ndarray) -> np.ndarray:
    """The mean of the precision at each relevant place of a ranking: (q,) float64, 0 where none is relevant.

    relevant: (q, places) bool, best place first.
    """
    hits = relevant.cumsum(axis=1)
    at_hits = np.where(relevant, hits / np.arange(1, relevant.shape[1] + 1), 0.0).sum(axis=1)
    return at_hits / np.maximum(relevant.sum(axis=1), 1)


def _rankings(embeddings: np.ndarray, label: np.ndarray, block_rows: int | None) -> Iterator[np.ndarray]:
    """Yield, for blocks of queries, whether the image at each place of a ranking has the query's label: (b, n - 1)."""
    count = len(embeddings)
    embeddings = np.where(np.isfinite(embeddings).all(axis=1, keepdims=True), embeddings, 0)
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = (embeddings / np.where(norms > 0, norms, 1)).astype(np.float32)
    rows = block_rows or max(1, MAX_RANKED_BLOCK_VALUES // max(count, 1))
    for first in range(0, count, rows):
        query = np.arange(first, min(first + rows, count))
        similarity = unit[query] @ unit.T
        # An image is not its own answer: it comes last.
        similarity[np.arange(len(query)), query] = -np.inf
        ranking = np.argsort(-similarity, axis=1, kind="stable")[:, :-1]
        yield label[ranking] == label[query, None]
