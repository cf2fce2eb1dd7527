"""What extract and prune change, without Ray: shards written by hand, and two commands at once, at every step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from changes_in_steps import commits_in_order, just_before_its_put
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from every_step import each_step
from hand_made import source, write_shard
from small_runs import settings
from tables_by_hand import commit_by_hand

from pipelines.errors import JobError
from pipelines.store.changes import Change, TableChange
from pipelines.store.extraction import Committer, ShardReport, drop_images
from pipelines.store.failures import failure_row
from pipelines.store.rewriting import merge_files, rewrite_without
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.store.transactions import transact
from pipelines.upkeep import verify


def shard(store: Store, run_id: str, ids: list[str], version: str = "v1", value: float = 1.0) -> ShardReport:
    return write_shard(store, run_id, [source(image_id, at, version) for at, image_id in enumerate(ids)], value)


def failed(image_id: str, run_id: str, version: str = "v1") -> ShardReport:
    row = failure_row(source(image_id, 0, version), "decode", "ImageError", "broken", 1, run_id)
    report = ShardReport("progress", failures=[row])
    return ShardReport.from_json(report.to_table()["report"][0].as_py())  # as it travels from a worker


def versions(ids: list[str], version: str = "v1") -> dict[str, tuple[int, str]]:
    return {image_id: (10, version) for image_id in ids}


def rows(store: Store) -> dict[str, str]:
    store.refresh()
    table = store.images.read(["image_id", "source_version"])
    assert len(table) == len(set(table["image_id"].to_pylist())), "an image has two rows"
    return dict(zip(table["image_id"].to_pylist(), table["source_version"].to_pylist(), strict=True))


def sound(store: Store) -> None:
    assert verify.run(store.config, store=store.uri).problems == []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(str(tmp_path / "store"), settings())


def create_and_add(uri: str) -> None:
    add(Store.create(uri, settings()), "r2", ["b"])


def test_two_runs_that_create_one_store(tmp_path: Path) -> None:
    """One stands at any of its steps while the other creates the store and commits to it."""
    for step in each_step(10):
        uri = str(tmp_path / str(step.number))
        with step.disturbed(partial(create_and_add, uri), reads=True):
            store = Store.create(uri, settings())
        if step.is_past:
            continue
        add(store, "r1", ["a", "b"])
        assert rows(store) == versions_only(["a", "b"])
        sound(store)
        shutil.rmtree(uri)


def test_a_shard_becomes_visible_whole(store: Store) -> None:
    report = shard(store, "r1", ["a", "b", "c"])
    assert rows(store) == {}
    outcome = Committer(store, "r1", set()).commit([report], versions(["a", "b", "c"]))
    assert (outcome.extracted, outcome.done_elsewhere) == (3, 0)
    assert rows(store) == versions_only(["a", "b", "c"])
    sound(store)


def versions_only(ids: list[str], version: str = "v1") -> dict[str, str]:
    return dict.fromkeys(ids, version)


def test_a_changed_image_replaces_its_rows_and_leaves_its_neighbours(store: Store) -> None:
    Committer(store, "r1", set()).commit([shard(store, "r1", ["a", "b", "c"])], versions(["a", "b", "c"]))
    versions_before = (store.images.version, store.patches.version)
    Committer(store, "r2", {"b"}).commit([shard(store, "r2", ["b"], "v2", 2.0)], versions(["b"], "v2"))
    assert rows(store) == {"a": "v1", "b": "v2", "c": "v1"}
    assert (store.images.version, store.patches.version) == tuple(v + 1 for v in versions_before), "one commit a table"
    patches = store.patches.read(["image_id", "descriptor"])
    of_b = patches.filter(pc.equal(patches["image_id"], "b"))
    assert set(np.concatenate(of_b["descriptor"].to_pylist())) == {2.0}
    sound(store)


def test_two_runs_commit_the_same_images_once(store: Store) -> None:
    other = Store.open_existing(store.uri, store.config)
    assert other
    first, second = Committer(store, "r1", set()), Committer(other, "r2", set())
    late = shard(other, "r2", ["b", "c", "d"], value=3.0)
    first.commit([shard(store, "r1", ["a", "b", "c"])], versions(["a", "b", "c"]))
    outcome = second.commit([late], versions(["b", "c", "d"]))
    assert (outcome.extracted, outcome.done_elsewhere) == (1, 2)
    assert rows(store) == versions_only(["a", "b", "c", "d"])
    sound(store)


def paused_at_every_step(
    folder: Path, first: Callable[[Store], object], one: Callable[[Store], object], other: Callable[[Store], object]
) -> Iterator[Store]:
    """Stores in which `other` ran whole while `one` stood at one of its steps, reading ones too."""
    for step in each_step(15):
        made = Store.create(str(folder / f"step-{step.number}"), settings())
        first(made)
        opened, beside = (Store.open_existing(made.uri, made.config) for _ in range(2))
        assert opened and beside
        with step.disturbed(partial(other, beside), reads=True):
            one(opened)
        if not step.is_past:
            yield made
        shutil.rmtree(made.uri)


def add(store: Store, run_id: str, ids: list[str], version: str = "v1", value: float = 1.0) -> None:
    Committer(store, run_id, set()).commit([shard(store, run_id, ids, version, value)], versions(ids, version))


def test_a_commit_that_lands_in_between_is_noticed(tmp_path: Path) -> None:
    """Two runs over some of the same images, of which one has changed for the second run only."""
    paused = paused_at_every_step(
        tmp_path,
        lambda store: add(store, "r0", ["o", "p"]),
        lambda store: add(store, "r1", ["a", "b", "o"], "v1"),
        lambda store: add(store, "r2", ["b", "z"]),
    )
    for store in paused:
        assert rows(store) == versions_only(["a", "b", "o", "p", "z"])
        sound(store)


def test_two_runs_that_replace_the_same_image_leave_one(tmp_path: Path) -> None:
    paused = paused_at_every_step(
        tmp_path,
        lambda store: add(store, "r0", ["a", "b"]),
        lambda store: add(store, "r1", ["b", "c"], "v2", 2.0),
        lambda store: add(store, "r2", ["b", "d"], "v2", 2.0),
    )
    for store in paused:
        assert rows(store) == {"a": "v1", "b": "v2", "c": "v2", "d": "v2"}
        sound(store)


def test_prune_beside_extract_takes_and_leaves_what_it_should(tmp_path: Path) -> None:
    """Either stands at one of its steps while the other runs whole."""

    def prune(store: Store) -> None:
        drop_images(store, ["b", "f"], "r1")

    def extract(store: Store) -> None:
        reports = [shard(store, "r2", ["a"], "v2", 2.0), shard(store, "r2", ["c"], "v2")]
        Committer(store, "r2", set()).commit(reports, versions(["a", "c"], "v2"))

    def first(store: Store) -> None:
        Committer(store, "r0", set()).commit(
            [shard(store, "r0", ["a", "b"]), failed("f", "r0")], versions(["a", "b", "f"])
        )

    for number, (one, other) in enumerate([(prune, extract), (extract, prune)]):
        for store in paused_at_every_step(tmp_path / str(number), first, one, other):
            assert rows(store) == {"a": "v2", "c": "v2"}
            assert store.failures.read(["image_id"]).num_rows == 0
            sound(store)


def test_images_that_another_run_added_after_the_plan_are_seen_whatever_was_refreshed(store: Store) -> None:
    """A prune refreshes the tables between its plan and its commits."""
    listing = sources_like(["a", "b", "c"])
    other = Store.open_existing(store.uri, store.config)
    assert other
    plan = store.plan(listing)
    add(other, "r2", ["a", "b"])
    add(other, "r2", ["gone"])
    assert drop_images(store, ["gone"], "r1") == 1
    committer = Committer(store, "r1", plan.changed, plan.seen)
    outcome = committer.commit([shard(store, "r1", ["a", "b", "c"])], versions(["a", "b", "c"]))
    assert (outcome.extracted, outcome.done_elsewhere) == (1, 2)
    assert rows(store) == versions_only(["a", "b", "c"])
    sound(store)


def sources_like(ids: list[str]) -> pa.Table:
    """A listing, as far as a plan looks at it."""
    columns = {"image_id": ids, "source_size": [10] * len(ids), "source_version": ["v1"] * len(ids)}
    return pa.table({**columns, "uri": [f"/in/{one}" for one in ids], "label": pa.nulls(len(ids), pa.string())})


CONFLICT = CommitFailedError("Failed to commit transaction: 0")  # what delta-rs says of its own repeated request
BROKEN_OFF = OSError("Generic S3 error: error reading a body from connection")


def fail_once(monkeypatch: pytest.MonkeyPatch, raced: Table, error: Exception, *, landed: bool) -> list[int]:
    """The next commit to a table raises, having landed or not; the list says when it did."""
    original, calls = DeltaTable.create_write_transaction, list[int]()

    def transaction(delta: DeltaTable, *arguments: object, **named: object) -> None:
        if delta.table_uri.rstrip("/").endswith(raced.uri.removeprefix("file://")) and not calls:
            calls.append(1)
            if landed:
                original(delta, *arguments, **named)
            raise error
        original(delta, *arguments, **named)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", transaction)
    monkeypatch.setattr("pipelines.store.publishing.FIRST_PAUSE_SECONDS", 0)
    return calls


@pytest.mark.parametrize("table", ["patches", "images", "failures"])
@pytest.mark.parametrize(
    ("error", "landed"),
    [(CONFLICT, True), (BROKEN_OFF, True), (BROKEN_OFF, False)],
    ids=["repeated by delta-rs", "answer lost", "request lost"],
)
def test_a_commit_whose_answer_is_lost_is_made_once(
    store: Store, table: str, error: Exception, landed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is replaced beside new ones and a failure: the commit that rewrites most."""
    Committer(store, "r1", set()).commit([shard(store, "r1", ["a", "b", "c"])], versions(["a", "b", "c"]))
    before = {name: getattr(store, name).version for name in ("patches", "images", "failures")}
    calls = fail_once(monkeypatch, getattr(store, table), error, landed=landed)
    reports = [shard(store, "r2", ["b"], "v2", 2.0), shard(store, "r2", ["d"], "v2"), failed("e", "r2", "v2")]
    outcome = Committer(store, "r2", {"b"}).commit(reports, versions(["b", "d", "e"], "v2"))
    assert calls and (outcome.extracted, outcome.failed, outcome.done_elsewhere) == (2, 1, 0)
    assert {name: getattr(store, name).version for name in before} == {name: v + 1 for name, v in before.items()}
    assert rows(store) == {"a": "v1", "b": "v2", "c": "v1", "d": "v2"}
    assert store.failures.read(["image_id"]).to_pylist() == [{"image_id": "e"}]
    sound(store)


def test_a_commit_of_another_run_is_not_taken_for_a_lost_answer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Store.open_existing(store.uri, store.config)
    assert other
    late = shard(store, "r1", ["a", "b"])
    Committer(other, "r2", set()).commit([shard(other, "r2", ["b", "c"])], versions(["b", "c"]))
    calls = fail_once(monkeypatch, store.images, BROKEN_OFF, landed=False)
    outcome = Committer(store, "r1", set()).commit([late], versions(["a", "b"]))
    assert calls and (outcome.extracted, outcome.done_elsewhere) == (1, 1)
    assert rows(store) == versions_only(["a", "b", "c"])
    sound(store)


def test_a_storage_that_stays_away_ends_the_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def transaction(*arguments: object, **named: object) -> None:
        raise BROKEN_OFF

    monkeypatch.setattr(DeltaTable, "create_write_transaction", transaction)
    monkeypatch.setattr("pipelines.store.publishing.FIRST_PAUSE_SECONDS", 0)
    with pytest.raises(JobError, match=r"Generic S3 error.*run the same command again, which completes it"):
        add(store, "r1", ["a"])
    monkeypatch.undo()
    assert store.repair("r2") == dict.fromkeys(store.repair("r2"), 0), "it is completed, and nothing is mended"
    assert rows(store) == {"a": "v1"}
    sound(store)


def test_a_repair_beside_a_commit_takes_nothing_from_it(tmp_path: Path) -> None:
    """Nor does the commit keep it from mending what a kill left before there were transactions."""

    def killed_before(store: Store) -> None:
        add(store, "r0", ["a"])
        orphan = shard(store, "r0", ["x"])
        assert orphan.patches
        commit_by_hand(store.patches, [orphan.patches], [], "r0")

    def repair(store: Store) -> None:
        store.repair("r1")

    def extract(store: Store) -> None:
        add(store, "r2", ["a", "b"], "v2", 2.0)

    for number, (one, other) in enumerate([(repair, extract), (extract, repair)]):
        for store in paused_at_every_step(tmp_path / str(number), killed_before, one, other):
            assert rows(store) == {"a": "v2", "b": "v2"}
            sound(store)


def test_patches_whose_images_never_came_are_removed(store: Store) -> None:
    Committer(store, "r1", set()).commit([shard(store, "r1", ["a"])], versions(["a"]))
    killed = shard(store, "r2", ["b"])
    assert killed.patches
    commit_by_hand(store.patches, [killed.patches], [], "r2")  # and the driver dies before it commits images
    assert verify.run(store.config, store=store.uri).problems
    assert store.repair("r3")["orphans_removed"] == 1
    assert rows(store) == {"a": "v1"}
    sound(store)


def test_a_replacement_killed_half_way_before_transactions_is_put_back(store: Store) -> None:
    """Its patches were committed, and its images were not."""
    add(store, "r1", ["a", "b"])
    (old,) = store.patches.files().values()
    new = shard(store, "r2", ["b"], "v2").patches
    copy = rewrite_without(store.patches, old, ["b"], "r2")
    assert new and copy
    commit_by_hand(store.patches, [new, copy], [old.path], "r2")
    assert verify.run(store.config, store=store.uri).problems
    found = store.repair("r3")
    assert found["orphans_removed"] == 2 and found["shards_restored"] == 1
    assert rows(store) == versions_only(["a", "b"])
    sound(store)


def test_images_whose_patches_are_lost_for_good_are_done_again(store: Store) -> None:
    first, second = shard(store, "r1", ["a"]), shard(store, "r1", ["b"])
    Committer(store, "r1", set()).commit([first, second], versions(["a", "b"]))
    assert first.patches
    commit_by_hand(store.patches, [], [first.patches.path], "x")
    (Path(store.uri) / "patches" / first.patches.path).unlink()
    assert store.repair("r2")["shards_lost"] == 1
    assert rows(store) == {"b": "v1"}
    sound(store)


def test_failures_are_recorded_once_and_settled_by_success(store: Store) -> None:
    Committer(store, "r1", set()).commit([failed("a", "r1"), failed("b", "r1")], versions(["a", "b"]))
    Committer(store, "r2", set()).commit([failed("a", "r2", "v2")], versions(["a"], "v2"))
    table = store.failures.read(["image_id", "run_id"])
    assert sorted(table.to_pylist(), key=str) == [{"image_id": "a", "run_id": "r2"}, {"image_id": "b", "run_id": "r1"}]
    Committer(store, "r3", set()).commit([shard(store, "r3", ["a"])], versions(["a"]))
    assert store.failures.read(["image_id"]).to_pylist() == [{"image_id": "b"}]
    sound(store)


def test_an_image_that_changed_into_a_broken_one_leaves_no_old_features(store: Store) -> None:
    Committer(store, "r1", set()).commit([shard(store, "r1", ["a", "b"])], versions(["a", "b"]))
    Committer(store, "r2", {"a"}).commit([failed("a", "r2", "v2")], versions(["a"], "v2"))
    assert rows(store) == {"b": "v1"}
    assert store.failures.read(["image_id"]).to_pylist() == [{"image_id": "a"}]
    sound(store)


def test_dropping_images_removes_their_patches_in_one_commit_a_table(store: Store) -> None:
    Committer(store, "r1", set()).commit([shard(store, "r1", ["a", "b"])], versions(["a", "b"]))
    Committer(store, "r1", set()).commit([shard(store, "r1", ["c"]), failed("d", "r1")], versions(["c", "d"]))
    before = (store.images.version, store.patches.version, store.failures.version)
    assert drop_images(store, ["a", "c", "d"], "r2") == 3
    assert (store.images.version, store.patches.version, store.failures.version) == tuple(v + 1 for v in before)
    assert rows(store) == {"b": "v1"}
    assert set(store.patches.read(["image_id"])["image_id"].to_pylist()) == {"b"}
    sound(store)


# In which order, and what is decided again


def test_what_images_name_is_published_before_them(store: Store) -> None:
    """Who reads the tables without a snapshot finds the patches of every image."""
    Committer(store, "r1", set()).commit([shard(store, "r1", ["a", "b"]), failed("c", "r1")], versions(["a", "b", "c"]))
    with commits_in_order(store.uri) as committed:
        Committer(store, "r2", set()).commit([shard(store, "r2", ["a", "c"], "v2")], versions(["a", "c"], "v2"))
    assert committed == ["patches", "images", "failures"]
    with commits_in_order(store.uri) as committed:
        drop_images(store, ["a"], "r3")
    assert committed == ["patches", "images"]
    orphan, lost = shard(store, "r4", ["x"]).patches, min(store.patches.files())
    assert orphan
    commit_by_hand(store.patches, [orphan], [lost], "r4")
    Path(store.uri, "patches", lost).unlink()
    with commits_in_order(store.uri) as committed:
        store.repair("r5")
    assert committed == ["patches", "images"]


def files_that_no_transaction_named(store: Store) -> set[str]:
    named = set[str]()
    for number in store.log.listing().numbers:
        transaction = store.log.read(number)
        assert transaction
        named |= {f"{entry.table}/{file.path}" for entry in transaction.tables for file in entry.add}
    folder = Path(store.uri)
    return {str(path.relative_to(folder)) for path in folder.rglob("part-*.parquet")} - named


@pytest.fixture
def beside(store: Store) -> Store:
    """The same store, opened by another process. It holds images a to d in one file, and failures x and y."""
    reports = [shard(store, "r0", list("abcd")), failed("x", "r0"), failed("y", "r0")]
    Committer(store, "r0", set()).commit(reports, versions(list("abcdxy")))
    opened = Store.open_existing(store.uri, store.config)
    assert opened
    return opened


def test_a_commit_that_is_decided_again_counts_and_leaves_what_it_did(store: Store, beside: Store) -> None:
    """Another run did one of its images, and changed the files that hold the others."""
    reports = [shard(store, "r1", ["a", "e"], "v2"), shard(store, "r1", ["b", "f"], "v2"), failed("x", "r1", "v2")]
    committer = Committer(store, "r1", set())
    with just_before_its_put(store.log, lambda: add(beside, "r2", ["b", "c"], "v2")):
        outcome = committer.commit(reports, versions(list("abefx"), "v2"))
    assert (outcome.extracted, outcome.done_elsewhere, outcome.failed) == (3, 1, 1)
    assert rows(store) == {"d": "v1"} | versions_only(list("abcef"), "v2")
    # what the first decision wrote is gone, and a shard that was copied without the image that is done elsewhere stays
    ours = reports[1]
    assert ours.patches and ours.images
    assert files_that_no_transaction_named(store) == {f"patches/{ours.patches.path}", f"images/{ours.images.path}"}
    sound(store)


def test_a_prune_that_is_decided_again_counts_and_leaves_what_it_did(store: Store, beside: Store) -> None:
    with just_before_its_put(store.log, lambda: drop_images(beside, ["a", "x"], "r2")):
        assert drop_images(store, ["a", "b", "x", "y"], "r1") == 2
    assert rows(store) == versions_only(["c", "d"])
    assert files_that_no_transaction_named(store) == set()
    with just_before_its_put(store.log, lambda: drop_images(beside, ["c"], "r4")):
        assert drop_images(store, ["d"], "r3") == 1
    assert rows(store) == {}
    assert files_that_no_transaction_named(store) == set()
    sound(store)


def test_a_prune_that_another_made_first_removes_nothing(store: Store, beside: Store) -> None:
    with just_before_its_put(store.log, lambda: drop_images(beside, ["a", "x"], "r2")):
        assert drop_images(store, ["a", "x"], "r1") == 0
    assert files_that_no_transaction_named(store) == set()
    sound(store)


def test_a_repair_that_is_decided_again_counts_and_leaves_what_it_did(store: Store, beside: Store) -> None:
    """Of three images in one file, one has lost its patches; another run took it up first."""
    lost, kept = shard(store, "r1", ["l"]), shard(store, "r1", ["m"])
    Committer(store, "r1", set()).commit([lost, kept], versions(["l", "m"]))
    images = list(store.images.files().values())
    merged = merge_files(store.images, images, "part-compact-0123456789ab.parquet")
    change = TableChange("images", store.images.schema, [merged], [file.path for file in images], rearranges=True)
    transact(beside.log, lambda _: Change([change]), run_id="compact", command="compact")
    assert lost.patches
    change_of_patches = TableChange("patches", store.patches.schema, [], [lost.patches.path])
    transact(beside.log, lambda _: Change([change_of_patches]), run_id="x", command="extract")
    Path(store.uri, "patches", lost.patches.path).unlink()
    with just_before_its_put(store.log, lambda: beside.repair("r2")):
        found = store.repair("r3")
    assert not any(found.values()), "the other one did it"
    assert rows(store) == versions_only(list("abcdm"))
    assert files_that_no_transaction_named(store) == set()
    sound(store)
