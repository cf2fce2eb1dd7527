"""matches/NAME in a store: the tables `pairs` and `matches`, and the settings that they were made with.

A pair is done when its row in `pairs` is there, for the extraction of both images that it names. Its matches come in
the same transaction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import counted
from pipelines.results.linked_results import LinkedResult
from pipelines.results.names import result_uri
from pipelines.store.parquet import DataFile
from pipelines.store.schemas import MATCHES, PAIRS
from pipelines.store.table import Table

PairKey = tuple[str, str]
"""Two image_ids, ascending."""

PAIR_VERSION_COLUMNS = ["image_a", "image_b", "run_id_a", "run_id_b"]


def pair_key(image_a: str, image_b: str) -> PairKey:
    """The same for both orders of a pair."""
    return (image_a, image_b) if image_a <= image_b else (image_b, image_a)


class MatchTables(LinkedResult["MatchReport"]):
    """The two tables of one NAME at the versions last refreshed."""

    kind = "matches"
    schemas: ClassVar = {"pairs": PAIRS, "matches": MATCHES}
    leading = "pairs"
    data = "matches"
    key_columns = ("image_a", "image_b")
    versioned = PAIR_VERSION_COLUMNS
    extractions = (("image_a", "run_id_a"), ("image_b", "run_id_b"))
    rows_are = "pairs"
    command = "correspond"

    @property
    def pairs(self) -> Table:
        return self.tables["pairs"]

    @property
    def matches(self) -> Table:
        return self.tables["matches"]

    def row_counts(self) -> dict[str, int]:
        """Pairs, matches (rows that were kept), and pairs without any."""
        kept = self.pairs.read(["kept"])["kept"]
        without = pc.sum(pc.equal(kept, 0)).as_py() or 0
        return {"pairs": len(kept), "matches": pc.sum(kept).as_py() or 0, "without_matches": without}

    def describe(self, counts: dict[str, int]) -> str:
        pairs, matches = counted(counts["pairs"], "pair"), counted(counts["matches"], "match", "matches")
        return f"{pairs} ({counts['without_matches']:,} without), {matches}"

    @classmethod
    def keys_of(cls, rows: pa.Table) -> pa.Array:
        a, b = rows["image_a"], rows["image_b"]
        ascending = pc.less_equal(a, b)
        return pc.binary_join_element_wise(
            pc.if_else(ascending, a, b), pc.if_else(ascending, b, a), "\0"
        ).combine_chunks()

    @staticmethod
    def files_of(report: MatchReport) -> tuple[DataFile | None, DataFile | None]:
        return report.pairs, report.matches

    @staticmethod
    def rows_of(report: MatchReport) -> pa.Table:
        return report.rows

    def reduced(
        self, report: MatchReport, gone: pa.Array, leading: DataFile | None, data: DataFile | None
    ) -> MatchReport:
        assert leading
        rows = report.rows.filter(pc.invert(pc.is_in(self.keys_of(report.rows), value_set=gone)))
        left = zip(rows["image_a"].to_pylist(), rows["image_b"].to_pylist(), strict=True)
        kept = {pair: report.kept[pair] for pair in left}
        return replace(report, kept=kept, rows=rows, pairs=leading, matches=data)


def is_in(rows: pa.Table, keys: set[PairKey]) -> pa.Array:
    """Which rows (image_a, image_b, ...) are of one of the pairs: bool."""
    a, b = rows["image_a"].to_pylist(), rows["image_b"].to_pylist()
    return pa.array([pair_key(*ids) in keys for ids in zip(a, b, strict=True)], pa.bool_())


def matches_uri(store: str, name: str) -> str:
    """Raises RequestError for a name that cannot be a folder's."""
    return result_uri(store, "matches", name)


@dataclass
class MatchReport:
    """What a worker wrote; the driver commits it.

    kept: (image_a, image_b) -> rows in matches. rows: PAIR_VERSION_COLUMNS of those in pairs. matches: None when no
    pair has any. reads: name of a reading that was used -> its bytes and seconds. seconds: match and write.
    """

    kept: dict[tuple[str, str], int]
    rows: pa.Table
    pairs: DataFile
    matches: DataFile | None
    bytes_written: int = 0
    reads: dict[str, tuple[int, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
