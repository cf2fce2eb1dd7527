"""matches/NAME in a store: the tables `pairs` and `matches`, and the settings that they were made with.

A pair is done when its row in `pairs` is committed, which happens after its matches are. A run that is killed
between the two commits leaves a file of matches that no pair names: `repair` removes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.errors import counted
from pipelines.results.names import result_uri
from pipelines.results.stored import ResultTables
from pipelines.store.commit import ORPHAN_GRACE_SECONDS, FileChange, apply_remaining, commit_in_order, describe_file
from pipelines.store.linked_tables import LinkedTables
from pipelines.store.parquet import DataFile
from pipelines.store.rewriting import rewrite
from pipelines.store.schemas import MATCHES, PAIRS
from pipelines.store.table import CommitConflict, Table

PairKey = tuple[str, str]
"""Two image_ids, ascending."""

PAIR_VERSION_COLUMNS = ["image_a", "image_b", "run_id_a", "run_id_b"]


def pair_key(image_a: str, image_b: str) -> PairKey:
    """The same for both orders of a pair."""
    return (image_a, image_b) if image_a <= image_b else (image_b, image_a)


class MatchTables(ResultTables):
    """The two tables of one NAME at the versions last refreshed."""

    kind = "matches"
    schemas: ClassVar = {"pairs": PAIRS, "matches": MATCHES}
    leading = "pairs"

    def __init__(self, store: str, name: str, options: storage.Options) -> None:
        super().__init__(store, name, options)
        self._seen = set(self.pairs.files())

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

    def linked_tables(self) -> Iterator[LinkedTables]:
        yield LinkedTables(self.matches, self.pairs)
        yield LinkedTables(self.pairs)

    def repair(self, run_id: str) -> dict[str, int]:
        """Undo what a killed run left between its commits; the pairs table decides what is true.

        Safe while a job is running: its files are given time to be named, and both look again after their own commits.
        """
        orphans = self.matches.files().keys() - self._named()
        if orphans:
            time.sleep(ORPHAN_GRACE_SECONDS)
            self.refresh()
            orphans = self.matches.files().keys() - self._named()
        apply_remaining(self.matches, FileChange(remove=sorted(orphans)), run_id)
        if orphans:
            # a slow job may have named them after we looked: they are put back below
            self.pairs.refresh()
        lost = self._named() - self.matches.files().keys()
        found = [shard for shard in sorted(lost) if self.matches.has_file(shard)]
        apply_remaining(self.matches, FileChange(add=[describe_file(self.matches, shard) for shard in found]), run_id)
        gone = pa.array(sorted(lost.difference(found)), pa.string())
        rows = self.pairs.read([*PAIR_VERSION_COLUMNS, "shard"])
        dropped = self.drop(rows.filter(pc.is_in(rows["shard"], value_set=gone)), run_id)
        self._seen = set(self.pairs.files())
        return {"orphans_removed": len(orphans), "shards_restored": len(found), "pairs_lost": dropped}

    def _named(self) -> set[str]:
        return set(pc.unique(self.pairs.read(["shard"])["shard"]).to_pylist()) - {None}

    def drop(self, rows: pa.Table, run_id: str) -> int:
        """Remove pairs and their matches, in one commit a table. Returns the number of pairs removed.

        rows: PAIR_VERSION_COLUMNS of pairs; the same pair of another extraction, which another run may have added
        meanwhile, stays.
        """
        unwanted = set(_versioned(rows))
        while unwanted:
            pairs, matches, dropped = FileChange(), FileChange(), 0
            files = self.matches.files()
            for path, file in self.pairs.files().items():
                held = self.pairs.read_file(path, [*PAIR_VERSION_COLUMNS, "shard"])
                gone = {pair_key(*row[:2]) for row in unwanted.intersection(_versioned(held))}
                if not gone:
                    continue
                dropped += len(gone)
                copies: dict[str, str | None] = {}
                for shard in set(held["shard"].to_pylist()) & files.keys():
                    copy = self._without(self.matches, files[shard], gone, run_id)
                    matches.remove.append(shard)
                    matches.add += [copy] if copy else []
                    copies[shard] = copy.path if copy else None
                kept = self._without(self.pairs, file, gone, run_id, copies)
                pairs.remove.append(path)
                pairs.add += [kept] if kept else []
            try:
                commit_in_order((self.matches, matches), (self.pairs, pairs), run_id)
                self._seen |= {file.path for file in pairs.add}
                return dropped
            except CommitConflict:
                self.refresh()
        return 0

    def commit(self, reports: Iterable[MatchReport], run_id: str) -> list[MatchReport]:
        """Make files of workers visible. Returns what became visible, without pairs that another run did first."""
        left = list(reports)
        while True:
            done = self._done_elsewhere({pair_key(*pair) for report in left for pair in report.kept})
            left = [kept for report in left if (kept := self._without_done(report, done, run_id))]
            matches = FileChange(add=[report.matches for report in left if report.matches])
            pairs = FileChange(add=[report.pairs for report in left])
            try:
                commit_in_order((self.matches, matches), (self.pairs, pairs), run_id)
                break
            except CommitConflict:
                self.refresh()
        self._seen |= {file.path for file in pairs.add}
        # another run's repair may have taken our matches for orphans just before their pairs arrived
        self.matches.refresh()
        apply_remaining(self.matches, matches, run_id)
        return left

    def _done_elsewhere(self, wanted: set[PairKey]) -> set[PairKey]:
        """Which of these pairs are in files that this run's plan did not see."""
        done: set[PairKey] = set()
        for path in self.pairs.files().keys() - self._seen:
            rows = self.pairs.read_file(path, ["image_a", "image_b"]).to_pylist()
            done |= wanted & {pair_key(row["image_a"], row["image_b"]) for row in rows}
        return done

    def _without_done(self, report: MatchReport, done: set[PairKey], run_id: str) -> MatchReport | None:
        """The report without pairs that another run finished first; None when nothing is left of it."""
        kept = {pair: rows for pair, rows in report.kept.items() if pair_key(*pair) not in done}
        if len(kept) == len(report.kept):
            return report
        matches = self._without(self.matches, report.matches, done, run_id) if report.matches else None
        copies = {report.matches.path: matches.path if matches else None} if report.matches else {}
        pairs = self._without(self.pairs, report.pairs, done, run_id, copies)
        return replace(report, kept=kept, pairs=pairs, matches=matches) if pairs else None

    @staticmethod
    def _without(
        table: Table, file: DataFile, gone: set[PairKey], run_id: str, renamed: dict[str, str | None] | None = None
    ) -> DataFile | None:
        """A copy of a file without some pairs, the files of matches renamed; None when nothing is left."""

        def change(rows: pa.Table) -> pa.Table:
            rows = rows.filter(pc.invert(is_in(rows, gone)))
            if renamed:
                shards = [renamed.get(shard, shard) for shard in rows["shard"].to_pylist()]
                rows = rows.set_column(rows.schema.get_field_index("shard"), "shard", pa.array(shards, pa.string()))
            return rows

        return rewrite(table, file, run_id, change)


def _versioned(rows: pa.Table) -> Iterator[tuple[str, ...]]:
    return zip(*(rows[name].to_pylist() for name in PAIR_VERSION_COLUMNS), strict=True)


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

    kept: (image_a, image_b) -> rows in matches. matches: None when no pair has any. reads: name of a reading that was
    used -> its bytes and seconds. seconds: match and write.
    """

    kept: dict[tuple[str, str], int]
    pairs: DataFile
    matches: DataFile | None
    bytes_written: int = 0
    reads: dict[str, tuple[int, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
