"""Small matches and parts, made as the jobs make them, but for what takes long: no patch is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from hand_made import add_described, described
from small_runs import settings

from pipelines import storage
from pipelines.results import match_checks, part_checks
from pipelines.results.linked_results import LinkedResult
from pipelines.results.matches import PAIR_VERSION_COLUMNS, MatchReport, MatchTables
from pipelines.results.parts import VERSIONED, PartTables, SegmentReport, keys_of
from pipelines.store.parquet import new_file_name, write_parquet
from pipelines.store.schemas import MATCHES, PAIRS, PARTS_IMAGES, PARTS_PATCHES
from pipelines.store.store import Store
from pipelines.store.transactions import open_for_writing

SIDE = 2  # patches along each side of an image
MATCHES_OF_A_PAIR = 3
SET_ID = "all"


def extracted(store: Store, run_id: str, ids: str) -> None:
    """Images that are new or changed, one for each letter."""
    add_described(store, run_id, {one: described(np.ones((SIDE, SIDE, 8))) for one in ids}, version=run_id)


def run_ids(store: str) -> dict[str, str]:
    """image_id -> the run that extracted it."""
    rows = DeltaTable(f"{store}/images").to_pyarrow_table(columns=["image_id", "run_id"]).to_pylist()
    found = {row["image_id"]: row["run_id"] for row in rows}
    assert len(found) == len(rows), "an image is there twice"
    return found


def write_matches(tables: MatchTables, run_id: str, pairs: list[str], runs: dict[str, str]) -> MatchReport:
    """Files of pairs such as "ab"; about every seventh has no matches, such as "ac"."""
    name, matches = new_file_name(run_id), []
    rows: list[dict[str, Any]] = []
    for pair in sorted(pairs):
        kept = MATCHES_OF_A_PAIR if sum(map(ord, pair)) % 7 else 0
        of_pair = {"image_a": pair[0], "image_b": pair[1]}
        rows.append(
            {
                **of_pair,
                "mutual": kept,
                "kept": kept,
                "shard": name if kept else None,
                **{f"run_id_{side}": runs[image] for side, image in zip("ab", pair, strict=True)},
            }
        )
        matches += [{**of_pair, "row_a": 0, "rank": rank} for rank in range(kept)]
    table = pa.Table.from_pylist(rows, schema=PAIRS)
    data = pa.Table.from_pylist(matches, schema=MATCHES)
    return MatchReport(
        kept={(row["image_a"], row["image_b"]): row["kept"] for row in rows},
        rows=table.select(PAIR_VERSION_COLUMNS),
        pairs=write_parquet(storage.join(tables.uri, "pairs"), name, table),
        matches=write_parquet(storage.join(tables.uri, "matches"), name, data) if matches else None,
    )


def write_parts(tables: PartTables, run_id: str, ids: list[str], runs: dict[str, str]) -> SegmentReport:
    """Files of images of one set, whose version is the extraction of each."""
    name = new_file_name(run_id)
    rows = [
        {
            "image_id": one,
            "set_id": SET_ID,
            "foreground_fraction": 0.5,
            "shard": name,
            "run_id": runs[one],
            "set_version": runs[one],
        }
        for one in sorted(ids)
    ]
    cells = [
        {"image_id": one, "set_id": SET_ID, "row": row, "col": col, "part_id": 0}
        for one in sorted(ids)
        for row in range(SIDE)
        for col in range(SIDE)
    ]
    table = pa.Table.from_pylist(rows, schema=PARTS_IMAGES)
    return SegmentReport(
        write_parquet(storage.join(tables.uri, "images"), name, table),
        write_parquet(storage.join(tables.uri, "patches"), name, pa.Table.from_pylist(cells, PARTS_PATCHES)),
        keys=keys_of(table).to_pylist(),
        rows=table.select([*VERSIONED, "run_id", "foreground_fraction", "note"]),
    )


@dataclass(frozen=True)
class Kind:
    """A kind of result with two tables. wanted: from image_ids to the things to make. write: files of some of them.
    disagreements: what its checks find."""

    name: str
    tables: Callable[[str], Any]
    wanted: Callable[[list[str]], list[str]]
    write: Callable[[Any, str, list[str], dict[str, str]], Any]
    disagreements: Callable[[Any], Any]

    def things(self, tables: LinkedResult[Any]) -> dict[str, tuple[str, ...]]:
        """What is there -> the extractions that it was made from."""
        table = tables.tables[tables.leading]
        columns = [name for pair in tables.extractions for name in pair]
        return {
            "".join(row[image_id] for image_id, _ in tables.extractions): tuple(
                row[run_id] for _, run_id in tables.extractions
            )
            for row in table.read(columns).to_pylist()
        }

    def job(self, store: str, run_id: str) -> None:
        """As the job does: everything that the store's images ask for and that is not there, in two commits."""
        tables = self.tables(store)
        open_for_writing(tables.log)
        runs = run_ids(store)
        tables.repair(run_id)
        tables.drop_outdated(run_id)
        there = self.things(tables)
        left = [one for one in self.wanted(sorted(runs)) if there.get(one) != tuple(runs[image] for image in one)]
        for some in (left[::2], left[1::2]):
            if some:
                tables.commit([self.write(tables, run_id, some, runs)], run_id)

    def holds(self, store: str) -> None:
        """Everything is there, made from what the store holds, once."""
        tables, runs = self.tables(store), run_ids(store)
        assert list(self.disagreements(tables)) == []
        assert self.things(tables) == {one: tuple(runs[image] for image in one) for one in self.wanted(sorted(runs))}


KINDS = (
    Kind(
        "matches",
        lambda store: MatchTables.open_or_make(store, "m", {}),
        lambda ids: ["".join(pair) for pair in combinations(ids, 2)],
        write_matches,
        match_checks.disagreements,
    ),
    Kind("parts", lambda store: PartTables.open_or_make(store, "m", {}), list, write_parts, part_checks.disagreements),
)


def new_store(uri: str, ids: str) -> Store:
    store = Store.create(uri, settings())
    extracted(store, "r1", ids)
    return store


def opened(uri: str) -> Store:
    return Store.open(uri, settings())
