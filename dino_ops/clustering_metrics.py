"""How well two labellings of the same items agree, whatever their labels are called.

Both numbers come from a Contingency, which is counted image by image and added up, so that the pixels or patches of a
whole dataset never meet in memory. Definitions and values in edge cases are scikit-learn's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Contingency:
    """How many items have each pair of labels. Parts are merged by addition.

    pairs: (m, 2) int64, distinct, in order: the label in the first labelling and in the second. counts: (m,) int64,
    positive.
    """

    pairs: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls) -> Contingency:
        return cls(np.zeros((0, 2), np.int64), np.zeros(0, np.int64))

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray, *, ignore: int | None = None) -> Contingency:
        """Count two labellings of the same shape. Items whose second label (the truth) is `ignore` do not count.

        first, second: integers of any shape.
        """
        if np.shape(first) != np.shape(second):
            raise ValueError(f"labellings of the same items differ in shape: {np.shape(first)} and {np.shape(second)}")
        pairs = np.stack([np.ravel(first), np.ravel(second)], axis=1).astype(np.int64)
        if ignore is not None:
            pairs = pairs[pairs[:, 1] != ignore]
        return cls._counted(pairs, np.ones(len(pairs), np.int64))

    @classmethod
    def _counted(cls, pairs: np.ndarray, counts: np.ndarray) -> Contingency:
        if not len(pairs):
            return cls.empty()
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        pairs, counts = pairs[order], counts[order]
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(pairs, axis=0) != 0).any(axis=1)]))
        return cls(pairs[starts], np.add.reduceat(counts, starts))

    def __add__(self, other: Contingency) -> Contingency:
        return self._counted(np.concatenate([self.pairs, other.pairs]), np.concatenate([self.counts, other.counts]))

    def __len__(self) -> int:
        """Items counted."""
        return int(self.counts.sum())

    def marginals(self) -> tuple[np.ndarray, np.ndarray]:
        """Items with each pair's first label, and with its second: (m,) float64 each."""
        of_first, of_second = (self._per_label(axis) for axis in (0, 1))
        return of_first[0][of_first[1]], of_second[0][of_second[1]]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Items with each label of the first labelling, and of the second: float64, in the order of labels."""
        return self._per_label(0)[0], self._per_label(1)[0]

    def _per_label(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        _, place = np.unique(self.pairs[:, axis], return_inverse=True)
        return np.bincount(place, self.counts).astype(np.float64), place


def normalized_mutual_information(contingency: Contingency) -> float:
    """Mutual information in parts of the arithmetic mean of both entropies, 0..1.

    1 where both labellings have a single label, or there are no items.
    """
    sizes = contingency.sizes()
    if all(len(of_label) <= 1 for of_label in sizes):
        return 1.0
    total = len(contingency)
    joint = contingency.counts / total
    first, second = contingency.marginals()
    information = float((joint * (np.log(joint) - np.log(first / total) - np.log(second / total))).sum())
    entropies = [-float((share * np.log(share)).sum()) for share in (of_label / total for of_label in sizes)]
    return min(1.0, max(0.0, information) / (sum(entropies) / 2))


def adjusted_rand_index(contingency: Contingency) -> float:
    """Pairs of items on which both labellings agree, corrected for chance: 1 when equal, about 0 at random, to -0.5.

    1 where both labellings have a single label, or every item has a label of its own in both.
    """
    together = _pairs_in(contingency.counts.astype(np.float64))
    of_first, of_second = (_pairs_in(of_label) for of_label in contingency.sizes())
    total = len(contingency) * (len(contingency) - 1) / 2
    expected = of_first * of_second / total if total else 0.0
    most = (of_first + of_second) / 2
    return 1.0 if most == expected else float((together - expected) / (most - expected))


def _pairs_in(sizes: np.ndarray) -> float:
    return float((sizes * (sizes - 1) / 2).sum())
