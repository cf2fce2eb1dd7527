"""Results of two tables change whole, whatever is killed, and whoever else is at work: each row is there once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from changes_in_steps import commits_in_order, just_before_its_put
from every_step import at_every_step, die
from small_results import KINDS, SIDE, Kind, extracted, new_store, opened, run_ids, write_parts
from tables_by_hand import commit_by_hand

from pipelines.results import part_checks
from pipelines.results.parts import PartTables
from pipelines.store.changes import Change, TableChange
from pipelines.store.parquet import new_file_name
from pipelines.store.rewriting import merge_files
from pipelines.store.schemas import PARTS_IMAGES
from pipelines.store.snapshots import Snapshot
from pipelines.store.transactions import transact

of_each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Kind, Path]:
    """A result of images a, b, c and d, of which b was extracted again since, and e is new."""
    kind: Kind = request.param
    store = new_store(str(tmp_path / "store"), "abcd")
    kind.job(store.uri, "r2")
    extracted(store, "r3", "be")
    return kind, tmp_path / "store"


def test_a_run_brings_a_result_up_to_date(changed: tuple[Kind, Path]) -> None:
    kind, store = changed
    kind.job(str(store), "r4")
    kind.holds(str(store))
    tables = kind.tables(str(store))
    before = tables.tables[tables.leading].version
    kind.job(str(store), "r5")
    tables.refresh()
    assert tables.tables[tables.leading].version == before


def test_a_run_is_killed_at_any_step_and_another_goes_on(changed: tuple[Kind, Path], tmp_path: Path) -> None:
    """After it images change, and then the same command is given."""
    kind, begin = changed
    for store in at_every_step(begin, tmp_path, lambda store: kind.job(store, "r4"), die):
        extracted(opened(store), "r5", "a")
        kind.job(store, "r6")
        kind.holds(store)


def test_two_runs_at_once(changed: tuple[Kind, Path], tmp_path: Path) -> None:
    """A whole other run comes before any step of one."""
    kind, begin = changed
    job = kind.job
    for store in at_every_step(begin, tmp_path, lambda store: job(store, "r4"), lambda store: job(store, "r5")):
        kind.holds(store)


@of_each_kind
def test_two_runs_that_begin_a_result_at_once(tmp_path: Path, kind: Kind) -> None:
    new_store(str(tmp_path / "store"), "abc")
    job = kind.job
    for store in at_every_step(
        tmp_path / "store", tmp_path, lambda store: job(store, "r2"), lambda store: job(store, "r3")
    ):
        kind.holds(store)


@pytest.mark.slow
def test_images_change_while_a_run_is_at_work(changed: tuple[Kind, Path], tmp_path: Path) -> None:
    """And another run takes them up before this one goes on, whose results are of images that are no more."""
    kind, begin = changed

    def other(store: str) -> None:
        extracted(opened(store), "r5", "ab")
        kind.job(store, "r6")

    for store in at_every_step(begin, tmp_path, lambda store: kind.job(store, "r4"), other):
        kind.holds(store)


def test_what_was_made_of_older_images_is_replaced(changed: tuple[Kind, Path]) -> None:
    """By a run whose plan did not see it, as another one that began earlier committed it meanwhile."""
    kind, path = changed
    store = str(path)
    kind.job(store, "r4")
    tables = kind.tables(store)  # what is there now is what its plan knows
    older = kind.tables(store)
    extracted(opened(store), "r5", "f")
    older.commit(
        [kind.write(older, "r6", [one for one in kind.wanted(list("af")) if "f" in one], run_ids(store))], "r6"
    )
    extracted(opened(store), "r7", "f")
    runs = run_ids(store)
    new = [one for one in kind.wanted(sorted(runs)) if "f" in one]
    (left,) = tables.commit([kind.write(tables, "r8", new, runs)], "r8")
    assert len(tables.rows_of(left)) == len(new)
    kind.holds(store)


def test_what_is_of_no_image_any_more_is_not_taken_up(changed: tuple[Kind, Path]) -> None:
    kind, path = changed
    store = str(path)
    kind.job(store, "r4")
    before = kind.things(kind.tables(store))
    extracted(opened(store), "r5", "fg")
    runs = run_ids(store)
    tables = kind.tables(store)
    report = kind.write(tables, "r6", [one for one in kind.wanted(list("afg")) if set(one) & set("fg")], runs)
    extracted(opened(store), "r7", "f")
    (left,) = tables.commit([report], "r6")
    added = kind.things(tables).keys() - before.keys()
    assert added and added == {one for one in kind.wanted(list("afg")) if "g" in one and "f" not in one}
    assert tables.changed_meanwhile == len(tables.rows_of(report)) - len(tables.rows_of(left)) > 0
    assert list(kind.disagreements(tables)) == []


# In which order, and what is decided again


def test_what_says_what_is_done_is_published_last(changed: tuple[Kind, Path]) -> None:
    """Who reads the tables without a snapshot finds the data of every row: when rows go, when they come, and when what
    an older dinoray left is mended."""
    kind, path = changed
    store = str(path)
    tables = kind.tables(store)
    in_order = [tables.path_of(table) for table in (tables.data, tables.leading)]
    with commits_in_order(store) as committed:
        kind.job(store, "r4")
    assert len(committed) >= 4 and committed == in_order * (len(committed) // 2)
    tables.refresh()
    data = tables.tables[tables.data]
    lost = min(data.files())
    commit_by_hand(data, [], [lost], "r5")
    Path(data.uri, lost).unlink()
    orphan = data.write_file(new_file_name("r6"), data.read_file(max(data.files())))
    commit_by_hand(data, [orphan], [], "r6")
    with commits_in_order(store) as committed:
        kind.tables(store).repair("r7")
    assert committed == in_order


def test_a_commit_that_is_decided_again_counts_what_it_did(changed: tuple[Kind, Path]) -> None:
    """Another run did all but one of the new things, and an image of the others was extracted again."""
    kind, path = changed
    store = str(path)
    kind.job(store, "r4")
    extracted(opened(store), "r5", "fg")
    runs = run_ids(store)
    tables, beside = kind.tables(store), kind.tables(store)
    new = [one for one in kind.wanted(sorted(runs)) if set(one) & set("fg")]
    elsewhere = [one for one in new if "f" in one]
    report = kind.write(tables, "r6", new, runs)
    with just_before_its_put(tables.log, lambda: beside.commit([kind.write(beside, "r7", elsewhere, runs)], "r7")):
        (left,) = tables.commit([report], "r6")
    assert len(tables.rows_of(left)) == len(new) - len(elsewhere) and tables.changed_meanwhile == 0
    kind.holds(store)

    extracted(opened(store), "r8", "g")
    runs = run_ids(store)
    tables = kind.tables(store)
    outdated = [one for one in kind.wanted(sorted(runs)) if "g" in one]
    with just_before_its_put(tables.log, lambda: kind.tables(store).drop_outdated("r9")):
        assert tables.drop_outdated("r10") == 0
    report = kind.write(tables, "r11", outdated, runs)
    with just_before_its_put(tables.log, lambda: extracted(opened(store), "r12", "g")):
        assert tables.commit([report], "r11") == [] and tables.changed_meanwhile == len(outdated)
    kind.job(store, "r13")
    kind.holds(store)


# What an older dinoray left


@of_each_kind
def test_what_was_killed_between_two_commits_is_mended(tmp_path: Path, kind: Kind) -> None:
    store = new_store(str(tmp_path / "store"), "abcd").uri
    kind.job(store, "r2")
    tables = kind.tables(store)
    data, leading = tables.tables[tables.data], tables.tables[tables.leading]
    rows = len(leading.read([leading.key]))
    files = sorted(data.files())
    first = files[0]
    copy = data.write_file("part-r3-0123456789ab.parquet", data.read_file(first))
    commit_by_hand(data, [copy], [], "r3")  # what names it never came
    assert list(kind.disagreements(tables)) != []
    found = kind.tables(store).repair("r4")
    assert {what: count for what, count in found.items() if count} == {"orphans_removed": 1}
    kind.holds(store)

    tables.refresh()
    commit_by_hand(data, [], [first], "r5")  # what names its copy never came
    found = kind.tables(store).repair("r6")
    assert {what: count for what, count in found.items() if count} == {"shards_restored": 1}
    kind.holds(store)

    tables.refresh()
    commit_by_hand(data, [], files, "r7")
    for path in files:
        Path(data.uri, path).unlink()
    found = kind.tables(store).repair("r8")
    lost = found.pop(f"{tables.rows_are}_lost")
    assert 0 < lost <= rows and not any(found.values())
    kind.job(store, "r9")
    kind.holds(store)


# Files that several files name


def compact(store: str, kind: Kind) -> None:
    """One file of data, which all files of the leading table name: as `compact` leaves them where those are large."""
    tables = kind.tables(store)
    data, leading = tables.tables[tables.data], tables.tables[tables.leading]

    def build(current: Snapshot) -> Change:
        old = current.files(tables.path_of(tables.data))
        merged = merge_files(data, list(old.values()), new_file_name("compact"))
        copies = []
        for path in (of_leading := current.files(tables.path_of(tables.leading))):
            rows = leading.read_file(path).cast(leading.schema)
            shards = pa.array([shard and merged.path for shard in rows["shard"].to_pylist()], pa.string())
            renamed = rows.set_column(rows.schema.get_field_index("shard"), "shard", shards)
            copies.append(leading.write_file(new_file_name("compact"), renamed))
        changed = ((tables.data, [merged], old), (tables.leading, copies, of_leading))
        return Change(
            [
                TableChange(tables.path_of(table), tables.schemas[table], add, list(remove), rearranges=True)
                for table, add, remove in changed
            ]
        )

    transact(tables.log, build, run_id="compact", command="compact")


@pytest.mark.slow
def test_files_are_merged_while_a_run_is_at_work(changed: tuple[Kind, Path], tmp_path: Path) -> None:
    kind, begin = changed
    merge = partial(compact, kind=kind)
    for store in at_every_step(begin, tmp_path, lambda store: kind.job(store, "r4"), merge):
        kind.holds(store)
        kind.job(store, "r5")
        kind.holds(store)


def test_a_run_ends_while_files_are_merged(changed: tuple[Kind, Path], tmp_path: Path) -> None:
    kind, begin = changed
    merge = partial(compact, kind=kind)
    for store in at_every_step(begin, tmp_path, merge, lambda store: kind.job(store, "r4")):
        kind.holds(store)


def test_an_image_is_dropped_from_a_file_that_two_files_name(tmp_path: Path) -> None:
    parts = KINDS[1]
    store = new_store(str(tmp_path / "store"), "abcd").uri
    parts.job(store, "r2")
    tables = PartTables.open_or_make(store, "m", {})
    compact(store, parts)
    tables.refresh()
    assert len(tables.images.files()) == 2 and len(tables.patches.files()) == 1
    rows = tables.images.read(["set_id", "image_id", "set_version"])
    assert tables.drop(rows.filter(pa.array([one == "b" for one in rows["image_id"].to_pylist()])), "r3") == 1
    assert parts.things(tables).keys() == set("acd")
    assert list(part_checks.disagreements(tables)) == []
    assert sum(file.rows for file in tables.patches.files().values()) == 3 * SIDE**2
    parts.job(store, "r4")
    parts.holds(store)


def test_only_files_with_what_is_dropped_are_written_again(tmp_path: Path) -> None:
    """A file of images that names several files of patches, of which one holds what goes."""
    store = new_store(str(tmp_path / "store"), "abcd").uri
    tables = PartTables.open_or_make(store, "m", {})
    runs = run_ids(store)
    for one in "abcd":
        tables.commit([write_parts(tables, "r2", [one], runs)], "r2")
    images = list(tables.images.files().values())
    merged = merge_files(tables.images, images, "part-compact-0123456789ab.parquet")
    change = Change([TableChange("parts/m/images", PARTS_IMAGES, [merged], [file.path for file in images])])
    transact(tables.log, lambda _: change, run_id="compact", command="compact")
    tables.refresh()
    before = tables.patches.files()
    rows = tables.images.read(["set_id", "image_id", "set_version"])
    assert tables.drop(rows.filter(pa.array([one == "b" for one in rows["image_id"].to_pylist()])), "r3") == 1
    assert len(before.keys() - tables.patches.files().keys()) == 1 and len(tables.patches.files()) == 3
    assert list(part_checks.disagreements(tables)) == []


def test_copies_that_a_decision_left_out_are_removed(changed: tuple[Kind, Path]) -> None:
    """Another run takes out the same rows first, so nothing is left of what was written for it."""
    kind, store = changed
    tables, written = kind.tables(str(store)), list[str]()

    def meanwhile() -> None:
        written.extend(path for table in tables.tables.values() for path in table.present_files() if "-r4-" in path)
        assert kind.tables(str(store)).drop_outdated("r9") == 1

    with just_before_its_put(tables.log, meanwhile):
        assert tables.drop_outdated("r4") == 0
    assert written
    assert not [path for table in tables.tables.values() for path in table.present_files() if "-r4-" in path]
