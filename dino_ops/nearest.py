"""Nearest vectors by cosine, with FAISS: which kind of index, and one that grows and shrinks without training again.

Vectors are known by int64 ids that the caller gives in ascending order and never uses twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["flat", "hnsw", "ivfpq"]
Pooling = Literal["mean", "gem"]

GEM_POWER = 3.0
# Generalised mean pooling needs positive values.
GEM_FLOOR = 1e-6

# Reading this many takes about 0.1 s.
MAX_VALUES_READ_PER_QUERY = 200_000_000
# A larger graph takes hours to build on few cores.
MAX_GRAPH_VECTORS = 2_000_000

# The lowest of the layers of an HNSW graph has twice as many.
GRAPH_LINKS_PER_VECTOR = 32
GRAPH_BUILD_CANDIDATES, GRAPH_SEARCH_CANDIDATES = 80, 128

# A product quantiser's codes have 8 bits.
CODEBOOK_ENTRIES = 256
# FAISS asks for 39.
TRAINING_VECTORS_PER_CENTROID = 40
MIN_TRAINING_VECTORS = CODEBOOK_ENTRIES * TRAINING_VECTORS_PER_CENTROID
VALUES_PER_CODE_BYTE = 4
LISTS_PER_PROBED_LIST = 32
MIN_PROBED_LISTS = 16
# The cosine of these candidates is computed again from half precision.
MIN_RERANKED, RERANKED_PER_RESULT = 200, 10

# Where more are dead, searches pass over too many: they should be purged, or a graph built again.
MAX_DEAD_SHARE = 0.2


@dataclass(frozen=True)
class Choice:
    """A kind of index and the memory that it takes.

    why: the reason, "2,000 vectors of 384 values are few enough to compare with every one".
    """

    kind: Kind
    why: str
    memory_bytes: int


def choose_kind(count: int, dimension: int, memory_bytes: float) -> Choice:
    """The kind for `count` vectors of `dimension` values that may take `memory_bytes`.

    Raises MemoryError with a sentence when none fits.
    """
    vectors = f"{count:,} vectors of {dimension} values"
    flat, hnsw, ivfpq = (estimate_bytes(kind, count, dimension) for kind in ("flat", "hnsw", "ivfpq"))
    if flat <= memory_bytes and (count * dimension <= MAX_VALUES_READ_PER_QUERY or count < MIN_TRAINING_VECTORS):
        return Choice("flat", f"{vectors} are few enough to compare with every one", flat)
    if hnsw <= memory_bytes and count <= MAX_GRAPH_VECTORS:
        return Choice("hnsw", f"{vectors} are many to compare with every one, and a graph of them fits memory", hnsw)
    if ivfpq <= memory_bytes and count >= MIN_TRAINING_VECTORS:
        reason = "are too many for a graph" if hnsw <= memory_bytes else "fit memory only compressed"
        return Choice("ivfpq", f"{vectors} {reason}", ivfpq)
    least = ivfpq if count >= MIN_TRAINING_VECTORS else flat
    raise MemoryError(f"{vectors} need {least / 1e9:.2g} GB even in the smallest index that can hold them")


def estimate_bytes(kind: Kind, count: int, dimension: int) -> int:
    """Memory of an index, its ids and what it re-ranks with included."""
    if kind == "flat":
        each = 4 * dimension + 8
    elif kind == "hnsw":
        each = 4 * dimension + 4 * 2 * GRAPH_LINKS_PER_VECTOR + 16  # the upper layers' share is small
    else:
        padded = _padded_dimension(dimension)
        each = padded // VALUES_PER_CODE_BYTE + 2 * padded + 16
    return count * each


def training_size(count: int) -> int:
    """How many of `count` vectors an ivfpq index is trained on."""
    return min(count, max(MIN_TRAINING_VECTORS, TRAINING_VECTORS_PER_CENTROID * _lists(count)))


class NearestIndex:
    """Unit vectors and their ids, searched by cosine similarity.

    parts: the FAISS indices it is made of, by name. ids: (n,) int64 ascending, in the order of `parts`.
    dead: (m,) int64 ascending, those of `ids` that were removed: they take space and are never found.
    """

    def __init__(self, kind: Kind, dimension: int, parts: dict[str, Any], ids: np.ndarray, dead: np.ndarray) -> None:
        self.kind = kind
        self.dimension = dimension
        self.parts = parts
        self.ids = ids
        self.dead = dead

    @classmethod
    def create(cls, kind: Kind, dimension: int, count: int = 0, sample: np.ndarray | None = None) -> NearestIndex:
        """An empty index, meant for about `count` vectors.

        sample: (training_size(count), dimension) of them; needed by ivfpq only.

        Raises ValueError when ivfpq has fewer than MIN_TRAINING_VECTORS to train on.
        """
        faiss = _faiss()

        if kind == "flat":
            parts: dict[str, Any] = {"vectors": faiss.IndexFlatIP(dimension)}
        elif kind == "hnsw":
            graph = faiss.IndexHNSWFlat(dimension, GRAPH_LINKS_PER_VECTOR, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = GRAPH_BUILD_CANDIDATES
            parts = {"vectors": graph}
        else:
            if sample is None or len(sample) < MIN_TRAINING_VECTORS:
                raise ValueError(f"ivfpq needs {MIN_TRAINING_VECTORS:,} vectors to train on")
            parts = _train_ivfpq(_padded(unit(sample)), count)
        return cls(kind, dimension, parts, np.zeros(0, np.int64), np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Vectors that a search can return."""
        return len(self.ids) - len(self.dead)

    def add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        """Add vectors (n, dimension) of any length; ids (n,) ascending and above all earlier ones."""
        self._add_unit(unit(vectors), ids)

    def absorb(self, flat: NearestIndex) -> None:
        """Add what a search of a flat index can return, under its ids, all above those that are here."""
        alive = np.flatnonzero(~np.isin(flat.ids, flat.dead))
        if len(alive):
            self._add_unit(flat.parts["vectors"].reconstruct_batch(alive), flat.ids[alive])

    def _add_unit(self, directions: np.ndarray, ids: np.ndarray) -> None:
        if not len(ids):
            return
        assert np.all(np.diff(ids, prepend=self.ids[-1:]) > 0), "ids must ascend"
        if self.kind == "ivfpq":
            directions = _padded(directions)
            self.parts["lists"].add_with_ids(directions, ids)
        self.parts["vectors"].add(directions)
        self.ids = np.concatenate([self.ids, ids])

    def remove(self, ids: np.ndarray) -> None:
        """Take vectors out of all answers, by their ids; `purge` gives their space back."""
        self.dead = np.union1d(self.dead, np.intersect1d(ids, self.ids))

    def purge(self) -> None:
        """Drop what was removed. A graph cannot: there it stays, until the graph is built again."""
        if self.kind == "hnsw" or not len(self.dead):
            return
        if self.kind == "ivfpq":
            self.parts["lists"].remove_ids(self.dead)
        # Positions, not ids: later vectors move up.
        self.parts["vectors"].remove_ids(np.searchsorted(self.ids, self.dead))
        self.ids = np.setdiff1d(self.ids, self.dead)
        self.dead = np.zeros(0, np.int64)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query: cosine (n, k) float32, best first, and ids (n, k) int64.

        queries: (n, dimension) of any length. Where there are fewer than k, cosine is -inf and the id is -1.
        """
        k_found = min(k, len(self))
        cosine = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        if not k_found or not len(queries):
            return cosine, ids
        directions = unit(queries)
        if self.kind == "ivfpq":
            found_cosine, positions = self._search_lists(_padded(directions), k_found)
        else:
            found_cosine, positions = self.parts["vectors"].search(directions, k_found, params=self._how_to_search(k))
        found = positions >= 0
        cosine[:, :k_found][found] = found_cosine[found]
        ids[:, :k_found][found] = self.ids[positions[found]]
        return cosine, ids

    def _how_to_search(self, k: int) -> Any:
        faiss = _faiss()

        alive = {"sel": _all_but(np.searchsorted(self.ids, self.dead))} if len(self.dead) else {}
        if self.kind == "flat":
            return faiss.SearchParameters(**alive) if alive else None
        return faiss.SearchParametersHNSW(efSearch=max(GRAPH_SEARCH_CANDIDATES, 2 * k), **alive)

    def _search_lists(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Candidates by their codes, then their cosines from half precision: (n, k) each, the second positions."""
        faiss = _faiss()

        lists, vectors = self.parts["lists"], self.parts["vectors"]
        candidates = min(len(self), max(MIN_RERANKED, RERANKED_PER_RESULT * k))
        alive = {"sel": _all_but(self.dead)} if len(self.dead) else {}
        probed = faiss.SearchParametersIVF(nprobe=max(MIN_PROBED_LISTS, lists.nlist // LISTS_PER_PROBED_LIST), **alive)
        _, ids = lists.search(queries, candidates, params=probed)
        cosine = np.full((len(queries), k), -np.inf, np.float32)
        positions = np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries):
            near = np.searchsorted(self.ids, ids[row][ids[row] >= 0])
            again = vectors.reconstruct_batch(near) @ query if len(near) else np.zeros(0, np.float32)
            best = np.argsort(-again, kind="stable")[:k]
            cosine[row, : len(best)], positions[row, : len(best)] = again[best], near[best]
        return cosine, positions


def search_all(indices: Sequence[NearestIndex], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each query in several indices together, as NearestIndex.search gives them."""
    if len(indices) == 1:
        return indices[0].search(queries, k)
    nothing = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    found = [nothing, *(index.search(queries, k) for index in indices)]
    cosine, ids = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosine, best, axis=1), np.take_along_axis(ids, best, axis=1)


def pool(descriptors: np.ndarray, pooling: Pooling) -> np.ndarray:
    """One vector (D,) float32 of the patches (n, D) of an image, n > 0: their mean or generalised mean."""
    if pooling == "mean":
        return descriptors.mean(axis=0, dtype=np.float64).astype(np.float32)
    powers = np.maximum(descriptors, GEM_FLOOR).astype(np.float64) ** GEM_POWER
    return (powers.mean(axis=0) ** (1 / GEM_POWER)).astype(np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, D) at length 1, float32 and contiguous; zero vectors stay zero."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _train_ivfpq(sample: np.ndarray, count: int) -> dict[str, Any]:
    faiss = _faiss()

    width = sample.shape[1]
    lists = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(width), width, _lists(count), width // VALUES_PER_CODE_BYTE, 8, faiss.METRIC_INNER_PRODUCT
    )
    # More iterations move recall by less than the re-ranking makes up for.
    lists.cp.niter = 10
    # With faiss-gpu and a GPU, the k-means of the lists runs there.
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        lists.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(width))
    lists.train(sample)
    if getattr(faiss, "get_num_gpus", lambda: 0)():
        lists.clustering_index = None
    half = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    return {"lists": lists, "vectors": half}


def _faiss() -> Any:
    """The module, loaded when first used. Its own type stubs lack half of what it has."""
    return importlib.import_module("faiss")


def _all_but(ids: np.ndarray) -> Any:
    """A selector of every other vector."""
    faiss = _faiss()

    return faiss.IDSelectorNot(faiss.IDSelectorBatch(ids))


def _lists(count: int) -> int:
    """Inverted lists for `count` vectors."""
    return max(1, min(int(4 * count**0.5), count // TRAINING_VECTORS_PER_CENTROID, 65_536))


def _padded_dimension(dimension: int) -> int:
    return -(-dimension // VALUES_PER_CODE_BYTE) * VALUES_PER_CODE_BYTE


def _padded(vectors: np.ndarray) -> np.ndarray:
    """With zeros up to a dimension that the product quantiser can divide; cosines stay."""
    missing = _padded_dimension(vectors.shape[1]) - vectors.shape[1]
    return np.pad(vectors, ((0, 0), (0, missing))) if missing else vectors
