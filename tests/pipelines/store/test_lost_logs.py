"""A table's log that is lost is said; nothing is made in its place that would hide the table's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hand_made import add_images, source
from small_runs import photo, settings
from two_table_store import files_in

from pipelines import extract
from pipelines.errors import DinorayError, JobError
from pipelines.results.clusters import ClusterTables
from pipelines.results.matches import MatchTables
from pipelines.results.parts import PartTables
from pipelines.results.stored import ResultTables
from pipelines.store.store import Store
from pipelines.upkeep import stats


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "20260101T000000Z-000000", [source("a.jpg", 1)])
    return made


def lose(table: str) -> None:
    shutil.rmtree(os.path.join(table, "_delta_log"))


def extracting(store: Store) -> Store:
    """The store as extract opens it."""
    opened = Store.open_existing(store.uri, store.config)
    assert opened
    opened.make_tables()
    opened.complete()
    return opened


def read_all(store: Store) -> None:
    opened = Store.open(store.uri, store.config)
    opened.images.read(["image_id"])
    opened.patches.read(["image_id"])
    opened.failures.read(["image_id"])


@pytest.mark.parametrize("name", ["images", "patches", "failures"])
@pytest.mark.parametrize("read", [read_all, lambda store: stats.run(store.config, store=store.uri)])
def test_a_reader_makes_no_table(name: str, read: Callable[[Store], object], store: Store) -> None:
    lose(f"{store.uri}/{name}")
    before = sorted(files_in(store.log))
    with pytest.raises(DinorayError, match=name):
        read(store)
    assert sorted(files_in(store.log)) == before


@pytest.mark.parametrize("name", ["images", "patches"])
def test_extract_makes_no_table_where_files_of_one_are(name: str, store: Store) -> None:
    lose(f"{store.uri}/{name}")
    with pytest.raises(JobError, match=f"The log of .*/{name} is gone"):
        extracting(store)


def test_a_dry_run_makes_no_table(store: Store, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    photo(1).save(tmp_path / "photos" / "a.jpg")
    lose(f"{store.uri}/failures")
    before = sorted(files_in(store.log))
    with pytest.raises(JobError, match="has no table failures"):
        extract.run(store.config, input=str(tmp_path / "photos"), store=store.uri, dry_run=True)
    assert sorted(files_in(store.log)) == before


def test_extract_makes_what_a_run_left_out_that_was_killed_while_it_made_a_store(store: Store) -> None:
    shutil.rmtree(os.path.join(store.uri, "failures"))
    assert len(extracting(store).failures.files()) == 0


@pytest.mark.parametrize("kind", [ClusterTables, PartTables, MatchTables])
def test_a_result_whose_log_is_lost_is_not_begun_again_over_its_files(kind: type[ResultTables], store: Store) -> None:
    table = next(iter(kind.schemas))
    made = kind.open_or_make(store.uri, "name", {}).tables[table]
    lose(made.uri)
    assert kind.open_existing(store.uri, "name", {}) is None
    kind.open_or_make(store.uri, "name", {})
    lose(made.uri)
    Path(made.uri, "part-x.parquet").write_bytes(b"rows")
    with pytest.raises(JobError, match=f"The log of .*/{table} is gone"):
        kind.open_or_make(store.uri, "name", {})
