"""Which pairs of images to match: all within a label, the nearest by embedding, or those of a file.

An image is its position in a table of images; pairs are two arrays of positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import RequestError, counted
from pipelines.sources.id_files import IdFile, names_shown, read_id_file

FORMS = "knn:K (such as knn:10), all, or a .csv, .jsonl or .parquet file with columns image_a and image_b"
FILE = IdFile("pairs", "correspond.pairs", FORMS, dict.fromkeys(("image_a", "image_b"), "an image_id"))
SIMILARITIES_HELD_AT_ONCE = 32_000_000
PAIRS_SCORED_AT_ONCE = 65_536
# The driver holds them in memory, some 100 bytes each.
MOST_PAIRS_OF_ALL = 20_000_000


@dataclass(frozen=True)
class Pairs:
    """Different images, no pair twice in either order.

    a, b: (n,) int64 positions in the table of images; a < b unless a file has it the other way. source: knn,
    all or file.
    """

    a: np.ndarray
    b: np.ndarray
    source: str
    messages: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.a)

    def keys(self, images: int) -> np.ndarray:
        """(n,) int64, the same for both orders of a pair of `images` images."""
        return unordered_keys(self.a, self.b, images)

    def take(self, kept: np.ndarray) -> Pairs:
        return Pairs(self.a[kept], self.b[kept], self.source)


def choose_pairs(asked: str, images: pa.Table, options: storage.Options) -> Pairs:
    """The pairs that correspond.pairs asks for.

    images: image_id, in key order; label for `all`, embedding for `knn:K`.

    Raises RequestError for anything that is none of the three forms, for pairs of unknown images, for more than
    MOST_PAIRS_OF_ALL of `all`, and where there are no pairs.
    """
    if asked == "all":
        pairs = pairs_within_labels(images["label"])
    elif nearest := re.fullmatch(r"knn:(\d+)", asked):
        if not int(nearest[1]):
            raise RequestError("correspond.pairs is knn:0, but every image needs a neighbour: give knn:1 or more.")
        pairs = nearest_pairs(embeddings_of(images, asked), int(nearest[1]))
    elif asked.startswith("knn"):
        raise RequestError(f"correspond.pairs is {asked}, but it must be {FORMS}.")
    else:
        pairs = pairs_of_file(asked, images["image_id"], options)
    if not len(pairs):
        raise RequestError(_no_pairs(asked, images))
    return pairs


def pairs_within_labels(labels: pa.ChunkedArray) -> Pairs:
    """All pairs of images that have the same label; images without one are in none.

    Raises RequestError, before they are made, for more than MOST_PAIRS_OF_ALL.
    """
    codes = pc.fill_null(labels.combine_chunks().dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    by_label = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[by_label], prepend=-2))
    groups = [group for group in np.split(by_label, starts[1:]) if len(group) and codes[group[0]] >= 0]
    if (count := sum(len(group) * (len(group) - 1) // 2 for group in groups)) > MOST_PAIRS_OF_ALL:
        largest = max(groups, key=len)
        raise RequestError(
            f"correspond.pairs is all, which makes {count:,} pairs ({labels[int(largest[0])].as_py()!r} alone labels "
            f"{counted(len(largest), 'image')}), more than the {MOST_PAIRS_OF_ALL:,} that one run takes: give knn:K or "
            "a file of pairs."
        )
    parts = [group[np.stack(np.triu_indices(len(group), 1))] for group in groups]
    a, b = np.concatenate([np.zeros((2, 0), np.int64), *parts], axis=1)
    messages = []
    if without := int((codes < 0).sum()):
        messages.append(f"{counted(without, 'image')} without a label {'is' if without == 1 else 'are'} in no pair.")
    return Pairs(a, b, "all", messages)


def nearest_pairs(embeddings: np.ndarray, k: int) -> Pairs:
    """Every image with its k nearest others by cosine similarity; two images that are near each other make one pair.

    embeddings: (n, D). Exact: all similarities are computed, in blocks.
    """
    unit = _unit(embeddings)
    count = len(unit)
    k = min(k, count - 1)
    if k < 1:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), "knn")
    found = []
    rows = max(1, SIMILARITIES_HELD_AT_ONCE // count)
    for first in range(0, count, rows):
        similarity = unit[first : first + rows] @ unit.T
        here = np.arange(len(similarity))
        similarity[here, here + first] = -np.inf
        nearest = np.argpartition(similarity, count - k, axis=1)[:, count - k :]
        found.append(unordered_keys(np.repeat(here + first, k), nearest.ravel(), count))
    a, b = np.divmod(np.unique(np.concatenate(found)), count)
    return Pairs(a, b, "knn")


def pairs_of_file(uri: str, image_ids: pa.ChunkedArray, options: storage.Options) -> Pairs:
    """The pairs that a CSV, JSON-lines or Parquet file lists.

    Raises RequestError when it cannot be read, lacks a column, or names images that are not there.
    """
    ids = read_id_file(uri, FILE, options)
    known = image_ids.combine_chunks()
    places = [pc.index_in(column, value_set=known) for column in ids]
    unknown = sorted({
        image_id
        for column, place in zip(ids, places, strict=True)
        for image_id in pc.unique(column.filter(pc.is_null(place))).to_pylist()
    })  # fmt: skip
    if unknown:
        raise RequestError(
            f"The pairs file {uri} names images that the store does not have: {names_shown(unknown)}. Extract them, or "
            "remove their rows."
        )
    a, b = (place.to_numpy().astype(np.int64) for place in places)
    different = a != b
    _, firsts = np.unique(unordered_keys(a, b, len(known)), return_index=True)
    kept = np.sort(firsts[different[firsts]])
    messages = []
    if same := int((~different).sum()):
        messages.append(f"{counted(same, 'pair')} of an image with itself in {uri} skipped.")
    if repeated := int(different.sum()) - len(kept):
        messages.append(f"{counted(repeated, 'pair')} that {uri} lists again, in either order, skipped.")
    return Pairs(a[kept], b[kept], "file", messages)


def scores(pairs: Pairs, embeddings: np.ndarray) -> np.ndarray:
    """Cosine similarity of the embeddings of each pair: (n,) float32."""
    unit = _unit(embeddings)
    parts = [
        np.einsum(
            "nd,nd->n", unit[pairs.a[at : at + PAIRS_SCORED_AT_ONCE]], unit[pairs.b[at : at + PAIRS_SCORED_AT_ONCE]]
        )
        for at in range(0, len(pairs), PAIRS_SCORED_AT_ONCE)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def embeddings_of(images: pa.Table, asked: str) -> np.ndarray:
    """The embeddings (n, D) float32 of images. Raises RequestError when some have none."""
    column = images["embedding"]
    if column.null_count:
        have = "has" if column.null_count == 1 else "have"
        raise RequestError(
            f"correspond.pairs is {asked}, but {counted(column.null_count, 'image')} of {len(column):,} {have} no "
            "embedding (features.embedding was false): give all or a file of pairs."
        )
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate([np.zeros(0, np.float32), *values]).reshape(len(column), -1)


def unordered_keys(a: np.ndarray, b: np.ndarray, images: int) -> np.ndarray:
    """One int64 for each pair of positions below `images`, whatever its order."""
    return np.minimum(a, b) * images + np.maximum(a, b)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of unit length; one that is not finite becomes zeros, or it would be every image's neighbour."""
    finite = np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0)
    return finite / np.maximum(np.linalg.norm(finite, axis=1, keepdims=True), 1e-12)


def _no_pairs(asked: str, images: pa.Table) -> str:
    if asked == "all":
        without = images["label"].null_count
        found = "none has a label" if without == len(images) else "no two share a label"
        return (
            f"There are no pairs to match: of {counted(len(images), 'image')} {found}; give knn:K or a file of pairs."
        )
    if asked.startswith("knn:"):
        return f"There are no pairs to match: the store has {counted(len(images), 'image')}; extract more."
    return f"There are no pairs to match: the pairs file {asked} lists no two different images."
