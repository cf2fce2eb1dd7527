"""Pairs of images of a report that were matched, and their matches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.results.matches import MatchTables, is_in
from pipelines.store.rows import rows_of

MAX_MATCHES_DRAWN_PER_PAIR = 10


@dataclass(frozen=True)
class Match:
    """Patch centres in pixels of the originals, and their cosine."""

    y_a: float
    x_a: float
    y_b: float
    x_b: float
    similarity: float


@dataclass(frozen=True)
class MatchedPair:
    """score: cosine of the embeddings; None where there are none. matches: best first."""

    image_a: str
    image_b: str
    score: float | None
    matches: list[Match]


def read_pairs(tables: MatchTables, image_ids: Sequence[str], most: int) -> list[MatchedPair]:
    """At most `most` pairs of these images that have matches: the most similar ones, each image once if possible."""
    columns = ["image_a", "image_b", "score", "kept", "shard"]
    rows = rows_of(tables.pairs, image_ids, columns)
    there = pa.array(sorted(image_ids), pa.string())
    rows = rows.filter(pc.and_(pc.is_in(rows["image_b"], value_set=there), pc.greater(rows["kept"], 0)))
    ranked = sorted(rows.to_pylist(), key=lambda row: (-(row["score"] or 0), row["image_a"], row["image_b"]))
    used: set[str] = set()
    first: list[dict[str, Any]] = []
    later: list[dict[str, Any]] = []
    for row in ranked:
        pair = {row["image_a"], row["image_b"]}
        (later if pair & used else first).append(row)
        used |= pair
    chosen = (first + later)[:most]
    matches = _matches(tables, chosen)
    return [
        MatchedPair(row["image_a"], row["image_b"], row["score"], matches.get((row["image_a"], row["image_b"]), []))
        for row in chosen
    ]


def _matches(tables: MatchTables, pairs: Sequence[dict[str, str]]) -> dict[tuple[str, str], list[Match]]:
    columns = ["image_a", "image_b", "y_a", "x_a", "y_b", "x_b", "similarity", "rank"]
    keys = {(row["image_a"], row["image_b"]) for row in pairs}
    rows = rows_of(tables.matches, {a for a, _ in keys}, columns, {row["shard"] for row in pairs})
    rows = rows.filter(is_in(rows, {(min(pair), max(pair)) for pair in keys}))
    found: dict[tuple[str, str], list[Match]] = {}
    for row in rows.sort_by([("rank", "ascending"), ("similarity", "descending")]).to_pylist():
        own = found.setdefault((row["image_a"], row["image_b"]), [])
        if row["rank"] >= 0 and len(own) < MAX_MATCHES_DRAWN_PER_PAIR:
            own.append(Match(row["y_a"], row["x_a"], row["y_b"], row["x_b"], row["similarity"]))
    return found
