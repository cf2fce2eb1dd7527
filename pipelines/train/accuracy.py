"""k-NN accuracy of the teacher while it is trained: all processes embed, and all know the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dino_ops.nearest_classes import classify_by_neighbours
from dino_ops.self_distillation import SelfDistillation
from pipelines.train.batches import CropWorkers

IMAGES_A_PIECE = 32
PIECES_AHEAD = 6
# The paper reports k-NN accuracy with this k.
K = 20


@dataclass(frozen=True)
class LabelledImages:
    """Images that vote and images that are tested; where there are no others the same ones, each tested by all others.

    Tables are rows of listings; labels (n,) are positions in the sorted names of those that vote, -1 for others.
    """

    voting: pa.Table
    voting_labels: np.ndarray
    tested: pa.Table | None
    tested_labels: np.ndarray


def choose_labelled(images: pa.Table, validation: pa.Table | None, most: int, seed: int) -> LabelledImages | None:
    """At most `most` labelled images of INPUT that vote, and of the validation images; None without two labels."""
    voting = _sample(images, most, seed)
    names = sorted(set(voting["label"].to_pylist()))
    tested = None if validation is None else _sample(validation, most, seed)
    if len(names) < 2 or len(voting) <= K or (tested is not None and not len(tested)):
        return None
    positions = pa.array(names, pa.string())

    def labels(table: pa.Table) -> np.ndarray:
        return np.asarray(pc.fill_null(pc.index_in(table["label"], value_set=positions), -1), np.int64)

    of_voting = labels(voting)
    return LabelledImages(voting, of_voting, tested, of_voting if tested is None else labels(tested))


def knn_accuracy(
    distillation: SelfDistillation, images: LabelledImages, size: int, workers: CropWorkers, rank: int, processes: int
) -> float | None:
    """Fraction of the tested images whose label the K nearest voting ones know; unreadable images are left out.

    None where too few can be read.
    """
    embeddings, rows = _embed(distillation, images.voting, size, workers, rank, processes)
    queries, tested = None, rows
    if images.tested is not None:
        queries, tested = _embed(distillation, images.tested, size, workers, rank, processes)
    if len(rows) <= K or not len(tested):
        return None
    labels = images.voting_labels[rows]
    found = classify_by_neighbours(embeddings, labels, queries, [K])[K]
    return float((found == images.tested_labels[tested]).mean())


def _embed(
    distillation: SelfDistillation, table: pa.Table, size: int, workers: CropWorkers, rank: int, processes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of all readable images, and their rows; every process computes a part."""
    import ray
    import torch.distributed as dist

    reference = ray.put(table)
    mine = np.arange(len(table))[rank::processes]
    pieces = [mine[at : at + IMAGES_A_PIECE] for at in range(0, len(mine), IMAGES_A_PIECE)]
    under_way: list[Any] = [workers.views(reference, piece, size) for piece in pieces[:PIECES_AHEAD]]
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for number in range(len(pieces)):
        views, rows, _ = ray.get(under_way.pop(0))
        if (following := number + PIECES_AHEAD) < len(pieces):
            under_way.append(workers.views(reference, pieces[following], size))
        if len(rows):
            parts.append((distillation.embed(views), rows))
    of_all: list[Any] = [parts]
    if processes > 1:
        of_all = [None] * processes
        dist.all_gather_object(of_all, parts)
    together = [part for its in of_all for part in its]
    if not together:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
    rows = np.concatenate([rows for _, rows in together])
    ordered = np.argsort(rows)
    return np.concatenate([embeddings for embeddings, _ in together])[ordered], rows[ordered]


def _sample(table: pa.Table, most: int, seed: int) -> pa.Table:
    labelled = np.flatnonzero(np.asarray(pc.is_valid(table["label"])))
    if len(labelled) > most:
        labelled = np.sort(np.random.default_rng(seed).choice(labelled, most, replace=False))
    return table.take(pa.array(labelled))
