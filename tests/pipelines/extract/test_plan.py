"""What is left to do for a listing: new, changed and failed images, and what is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hand_made import add_failure, add_images, source
from small_runs import settings

from pipelines.sources import LISTING_SCHEMA
from pipelines.store.extraction import Plan
from pipelines.store.store import Store


def listing(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["image_id"]), schema=LISTING_SCHEMA)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """`a` and `b` are done, `c` failed."""
    store = Store.create(str(tmp_path / "store"), settings())
    add_images(store, "r1", [source("a"), source("b", 1)])
    add_failure(store, "r1", "c")
    store.refresh()
    return store


def ids(plan: Plan) -> list[str]:
    assert plan.pending["position"].to_pylist() == list(range(len(plan.pending)))
    return plan.pending["image_id"].to_pylist()


def test_nothing_is_left_of_the_same_listing(store: Store) -> None:
    plan = store.plan(listing(source("a"), source("b"), source("c")))
    assert (ids(plan), plan.done, plan.failed_before, plan.changed, plan.gone) == ([], 2, 1, set(), [])


def test_new_and_changed_images_are_left(store: Store) -> None:
    grown = source("a") | {"source_size": 11}
    plan = store.plan(listing(grown, source("b", version="v2"), source("c"), source("d")))
    assert (ids(plan), plan.changed, plan.done) == (["a", "b", "d"], {"a", "b"}, 0)


def test_failures_are_tried_again_when_asked_or_when_the_file_changed(store: Store) -> None:
    assert ids(store.plan(listing(source("a"), source("c")), retry_failed=True)) == ["c"]
    mended = store.plan(listing(source("a"), source("c", version="v2")))
    assert (ids(mended), mended.failed_before, mended.changed) == (["c"], 0, set())


def test_what_is_gone_from_the_input(store: Store) -> None:
    assert sorted(store.plan(listing(source("b"))).gone) == ["a", "c"]


def test_a_limit_takes_the_first_of_what_is_left(store: Store) -> None:
    rows = listing(source("a"), source("b", version="v2"), source("d"), source("e"))
    plan = store.plan(rows, limit=1)
    assert (ids(plan), plan.changed) == (["b"], {"b"})
    assert ids(store.plan(rows, limit=2)) == ["b", "d"]
    later = store.plan(listing(source("0"), source("b", version="v2")), limit=1)
    assert (ids(later), later.changed) == (["0"], set())


def test_an_empty_store_leaves_everything() -> None:
    assert ids(Plan.of_empty_store(listing(source("a"), source("b")), limit=1)) == ["a"]


def test_failures_of_listing_time_are_known(store: Store) -> None:
    assert store.failed_in_listing() == set()
