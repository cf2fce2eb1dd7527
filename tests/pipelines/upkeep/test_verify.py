"""verify: a sound store passes, and each way of damaging one is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hand_made import DIMENSIONS, GRID, add_failure, add_images, source
from small_results import KINDS, run_ids
from small_runs import settings
from tables_by_hand import commit_by_hand
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.store import parquet, publishing
from pipelines.store.failures import failure_row
from pipelines.store.parquet import DataFile, new_file_name, parquet_options
from pipelines.store.schemas import FAILURES, vector
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.store.transaction_log import TransactionLog
from pipelines.upkeep import compact, stats, verify

CELLS = GRID[0] * GRID[1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two shards of images and a failure."""
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "r1", [source("a", 0), source("b", 1), source("c", 2)])
    add_images(made, "r1", [source("d", 0)])
    add_failure(made, "r1", "e")
    return made


def problems(store: Store) -> list[str]:
    return verify.run(store.config, store=store.uri).problems


def only_problem(store: Store) -> str:
    (problem,) = problems(store)
    return problem


def file_of(table: Table, image_id: str) -> DataFile:
    """The file that holds an image."""
    table.refresh()
    return next(file for file in table.files().values() if file.min_id <= image_id <= file.max_id)


def path_of(table: Table, file: DataFile) -> Path:
    return Path(table.uri) / file.path


def damage(
    store: Store,
    name: str,
    image_id: str,
    change: Callable[[pa.Table], pa.Table],
    log: Callable[[DataFile], DataFile] = lambda file: file,
    row_group_size: int | None = None,
) -> None:
    """Replace the file that holds an image by a changed one, in place, with a log that agrees with its size."""
    table: Table = getattr(store, name)
    old = file_of(table, image_id)
    rows = change(pq.read_table(path_of(table, old)))
    fresh = new_file_name("damage")
    options = parquet_options(rows.schema)
    pq.write_table(rows, Path(table.uri) / fresh, row_group_size=row_group_size, **options)
    size = (Path(table.uri) / fresh).stat().st_size
    path_of(table, old).unlink()
    (Path(table.uri) / fresh).rename(path_of(table, old))
    described = DataFile(old.path, size, len(rows), old.min_id, old.max_id)
    commit_by_hand(table, [], [old.path], "damage")
    commit_by_hand(table, [log(described)], [], "damage")


def without(image_id: str) -> Callable[[pa.Table], pa.Table]:
    return lambda rows: rows.filter(pc.not_equal(rows["image_id"], image_id))


def with_value(column: str, image_id: str, value: Any, at: int | None = None) -> Callable[[pa.Table], pa.Table]:
    """Set a column of an image's rows (of its row `at` alone, where given)."""

    def change(rows: pa.Table) -> pa.Table:
        content = rows.to_pylist()
        chosen = [row for row in content if row["image_id"] == image_id]
        for row in chosen if at is None else [chosen[at]]:
            row[column] = value
        return pa.Table.from_pylist(content, schema=rows.schema)

    return change


def test_a_sound_store_has_no_problem_and_ends_with_0(store: Store) -> None:
    found = verify.run(store.config, store=store.uri)
    assert found.problems == [] and found.exit_code == 0
    assert (found.images, found.patches, found.failures, found.files) == (4, 4 * CELLS, 1, 5)
    result = CliRunner().invoke(app, ["verify", store.uri])
    assert result.exit_code == 0 and "is sound: 4 images" in result.stdout


def test_an_empty_store_is_sound(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings())
    assert problems(made) == []


def test_a_problem_ends_with_1_and_is_printed(store: Store) -> None:
    path_of(store.patches, file_of(store.patches, "d")).unlink()
    result = CliRunner().invoke(app, ["verify", store.uri])
    assert result.exit_code == 1
    assert "missing" in result.stdout and result.stderr == f"1 problem in {store.uri}.\n"


@pytest.mark.parametrize("table", ["images", "patches", "failures"])
def test_a_missing_file_is_named(store: Store, table: str) -> None:
    one = getattr(store, table)
    file = next(iter(one.files().values()))
    path_of(one, file).unlink()
    problem = only_problem(store)
    assert problem.startswith(f"{table}: {file.path}") and "missing" in problem


@pytest.mark.parametrize("table", ["images", "patches", "failures"])
def test_a_truncated_file_is_named(store: Store, table: str) -> None:
    one = getattr(store, table)
    file = next(iter(one.files().values()))
    path_of(one, file).write_bytes(path_of(one, file).read_bytes()[:-40])
    found = problems(store)
    assert f"{table}: {file.path} has {file.size - 40} bytes, the log says {file.size}" in found
    assert any("cannot be read as Parquet" in problem for problem in found)


@pytest.mark.parametrize("table", ["images", "patches", "failures"])
def test_damage_inside_a_file_of_the_right_size_is_named(store: Store, table: str) -> None:
    one = getattr(store, table)
    path = path_of(one, next(iter(one.files().values())))
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    assert table in only_problem(store)


def test_patches_that_an_image_lacks_are_named(store: Store) -> None:
    damage(store, "patches", "b", without("b"))
    problem = only_problem(store)
    assert "b has 0 patches" in problem and f"ask for {CELLS}" in problem


def test_one_missing_patch_is_named(store: Store) -> None:
    damage(store, "patches", "a", lambda rows: rows.slice(1))
    assert f"a has {CELLS - 1} patches" in only_problem(store)


def test_an_image_that_has_two_rows_is_named(store: Store) -> None:
    damage(store, "images", "b", lambda rows: pa.concat_tables([rows, rows.slice(1, 1)]))
    assert "images: b has 2 rows" in problems(store)


def test_a_failure_that_has_two_rows_is_named(store: Store) -> None:
    damage(store, "failures", "e", lambda rows: pa.concat_tables([rows, rows]))
    assert problems(store) == ["failures: e has 2 rows"]


@pytest.mark.parametrize(("column", "value"), [("grid_width", 5), ("grid_height", 2)])
def test_a_grid_that_does_not_match_the_patches_is_named(store: Store, column: str, value: int) -> None:
    damage(store, "images", "b", with_value(column, "b", value))
    assert any(f"b has {CELLS} patches" in problem for problem in problems(store))


def test_a_transposed_grid_is_named(store: Store) -> None:
    damage(store, "images", "b", with_value("grid_width", "b", GRID[0]))
    damage(store, "images", "b", with_value("grid_height", "b", GRID[1]))
    assert any("b has patches outside its grid" in problem for problem in problems(store))


def test_patches_of_an_image_nobody_has_are_named(store: Store) -> None:
    damage(store, "images", "b", without("b"))
    assert "patches: b in" in only_problem(store)


def test_a_shard_that_no_file_is_named_after(store: Store) -> None:
    damage(store, "images", "d", with_value("shard", "d", "part-none.parquet"))
    assert "images: 1 row names shard part-none.parquet, which patches does not have" in problems(store)


def test_an_image_without_a_shard_is_named(store: Store) -> None:
    damage(store, "images", "d", with_value("shard", "d", None))
    assert "images: d has no patches" in problems(store)


def test_a_vector_of_another_length_is_named(store: Store) -> None:
    damage(store, "patches", "b", with_value("descriptor", "b", [1.0] * (DIMENSIONS - 1), at=3))
    assert "descriptor" in only_problem(store) and "7" in only_problem(store)


def test_vectors_whose_length_differs_between_shards_are_named(store: Store) -> None:
    damage(store, "patches", "d", with_value("descriptor", "d", [1.0] * (DIMENSIONS + 1)))
    assert "descriptor" in only_problem(store) and "9" in only_problem(store)


def test_a_missing_vector_is_named(store: Store) -> None:
    damage(store, "patches", "b", with_value("descriptor", "b", None, at=0))
    assert "descriptor" in only_problem(store)


@pytest.mark.parametrize(("column", "value"), [("row", GRID[0]), ("col", GRID[1]), ("row", -1), ("col", None)])
def test_a_patch_outside_the_grid_is_named(store: Store, column: str, value: int | None) -> None:
    damage(store, "patches", "b", with_value(column, "b", value, at=0))
    assert "b has patches outside its grid" in only_problem(store)


def test_a_patch_that_is_there_twice_is_named(store: Store) -> None:
    damage(store, "patches", "b", with_value("col", "b", 1, at=0))
    assert "patches: b has patch (0, 1) 2 times" in only_problem(store)


def test_an_image_that_is_done_and_failed_is_named(store: Store) -> None:
    row = failure_row(source("a"), "decode", "ImageError", "it is broken", 1, "r2")
    rows = pa.Table.from_pylist([{name: row[name] for name in FAILURES.names}], schema=FAILURES)
    commit_by_hand(store.failures, [store.failures.write_file(new_file_name("r2"), rows)], [], "r2")
    assert problems(store) == ["a is in images and in failures"]


def test_an_embedding_of_another_length_is_named(store: Store) -> None:
    damage(store, "images", "b", with_value("embedding", "b", [1.0] * (DIMENSIONS + 1)))
    assert "embedding" in only_problem(store) and "b" in only_problem(store)


def test_a_missing_embedding_is_named(store: Store) -> None:
    damage(store, "images", "b", with_value("embedding", "b", None))
    assert "embedding" in only_problem(store)


def test_an_embedding_that_the_spec_leaves_out_is_not_missed(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings("features.embedding=false"))
    add_images(made, "r1", [source("a")])
    damage(made, "images", "a", with_value("embedding", "a", None))
    assert problems(made) == []


def test_rows_out_of_key_order_are_named(store: Store) -> None:
    damage(store, "patches", "a", lambda rows: rows.sort_by([("image_id", "descending")]))
    assert any("key order" in problem for problem in problems(store))


def test_rows_of_an_image_that_are_apart_are_named(store: Store) -> None:
    def apart(rows: pa.Table) -> pa.Table:
        order = np.argsort(np.arange(len(rows)) % CELLS, kind="stable")
        return rows.take(pa.array(order))

    damage(store, "patches", "a", apart)
    assert any("key order" in problem for problem in problems(store))


def test_an_image_split_over_row_groups_is_named(store: Store) -> None:
    damage(store, "patches", "a", lambda rows: rows, row_group_size=CELLS - 1)
    assert any("key order (row group 1)" in problem for problem in problems(store))


@pytest.mark.parametrize(
    ("table", "held", "logged"),
    [("images", "1 row", 2), ("patches", f"{CELLS} rows", CELLS + 1), ("failures", "1 row", 2)],
)
def test_a_log_that_counts_other_rows_is_named(store: Store, table: str, held: str, logged: int) -> None:
    def miscounted(file: DataFile) -> DataFile:
        return DataFile(file.path, file.size, file.rows + 1, file.min_id, file.max_id)

    image_id = "e" if table == "failures" else "d"
    damage(store, table, image_id, lambda rows: rows, log=miscounted)
    problem = only_problem(store)
    assert problem.startswith(f"{table}: ") and problem.endswith(f".parquet has {held}, the log says {logged}")


@pytest.mark.parametrize("table", ["images", "patches", "failures"])
def test_a_log_with_another_key_range_is_named(store: Store, table: str) -> None:
    """Readers skip files by this range, so a wrong one hides rows."""

    def narrowed(file: DataFile) -> DataFile:
        return DataFile(file.path, file.size, file.rows, "x", "y")

    image_id = "e" if table == "failures" else "d"
    damage(store, table, image_id, lambda rows: rows, log=narrowed)
    problem = only_problem(store)
    assert problem.startswith(f"{table}: ") and "the log says" in problem and "'x'" in problem


def test_columns_of_another_type_are_named(store: Store) -> None:
    def doubled(rows: pa.Table) -> pa.Table:
        index = rows.schema.get_field_index("descriptor")
        return rows.set_column(index, "descriptor", rows["descriptor"].cast(vector(pa.float64())))

    damage(store, "patches", "d", doubled)
    assert "descriptor" in only_problem(store)


def test_int8_vectors_without_their_scale_are_named(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings("store.dtype=int8"))
    add_images(made, "r1", [source("a")])
    assert problems(made) == []
    damage(made, "patches", "a", lambda rows: rows.drop_columns(["scale"]))
    assert "scale" in only_problem(made)


def test_pca_decides_the_length_of_vectors(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings(f"store.pca={DIMENSIONS - 2}"))
    add_images(made, "r1", [source("a")])
    lengths, without_pca = problems(made)
    assert "descriptor" in lengths and "projection.parquet is missing" in without_pca


def test_thinned_stores_are_sound_and_checked(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings("store.every=5"))
    add_images(made, "r1", [source("a")])
    assert problems(made) == [] and verify.run(made.config, store=made.uri).patches == 3
    damage(made, "patches", "a", lambda rows: rows.slice(1))
    assert "a has 2 patches" in only_problem(made)


def test_files_of_unfinished_writes_are_counted_and_harmless(store: Store) -> None:
    (Path(store.patches.uri) / "part-killed.parquet").write_bytes(b"half of a file")
    found = verify.run(store.config, store=store.uri)
    assert found.problems == [] and found.unreferenced_files == 1


def test_many_problems_of_a_kind_are_summed_up(tmp_path: Path) -> None:
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "r1", [source(f"{number:03}", number) for number in range(30)])
    damage(made, "patches", "000", lambda rows: rows.slice(0, 0))
    found = problems(made)
    assert len(found) == verify.MOST_PROBLEMS_OF_A_KIND + 1 and found[-1] == "... and 10 more like the last"


# the log of transactions


def test_a_change_whose_writer_was_killed_is_harmless(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither seen half nor called damage, and the next command that writes completes it."""
    commit = publishing._commit

    def killed(log: TransactionLog, delta: DeltaTable, *more: Any) -> None:
        if delta.table_uri.rstrip("/").endswith("images"):
            raise KeyboardInterrupt
        commit(log, delta, *more)

    monkeypatch.setattr(publishing, "_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        add_images(store, "r2", [source("f", 0)])
    monkeypatch.undo()
    found = verify.run(store.config, store=store.uri)
    assert (found.problems, found.images, found.exit_code) == ([], 4, 0)
    assert found.messages == [
        "Transaction 5 (extract) is not completed: its writer is at work, or was killed, and then the next command "
        "that writes completes it."
    ]
    store.repair("r3")
    found = verify.run(store.config, store=store.uri)
    assert (found.problems, found.images, found.messages) == ([], 5, [])


def test_tables_that_are_ahead_of_the_log(store: Store) -> None:
    for path in Path(store.log.folder).glob(f"{4:020}.*"):
        path.unlink()
    assert "failures has transaction 4, and" in only_problem(store) and "ends at 3" in only_problem(store)
    shutil.rmtree(store.log.folder)
    assert len(problems(store)) == 3 and all("ends at 0" in problem for problem in problems(store))


def test_a_table_that_is_behind_the_log(store: Store) -> None:
    add_images(store, "r2", [source("f", 0)])
    (Path(store.images.uri) / "_delta_log" / f"{3:020}.json").unlink()
    assert "images does not have transaction 5, which" in only_problem(store)


# one damaged part and the others


def with_results(store: Store) -> Store:
    """Two matches and parts of images that the store has."""
    for kind in KINDS:
        tables = kind.tables(store.uri)
        runs = run_ids(store.uri)
        tables.commit([kind.write(tables, "r9", kind.wanted(["a", "b"]), runs)], "r9")
    return store


def lose_log(store: Store, table: str) -> None:
    shutil.rmtree(Path(store.uri, table, "_delta_log"))


def test_a_damaged_log_of_a_result_keeps_nothing_else_from_being_checked(store: Store) -> None:
    with_results(store)
    lose_log(store, "matches/m/pairs")
    for log in Path(store.uri, "parts", "m", "images", "_delta_log").iterdir():
        log.write_bytes(b"{")
    path_of(store.failures, file_of(store.failures, "e")).unlink()
    found = problems(store)
    assert len(found) == 3
    assert any("The log of" in one and "matches/m/pairs is gone" in one for one in found)
    assert any("The log of" in one and "parts/m/images is damaged" in one for one in found)
    assert any(one.startswith("failures: part-") for one in found)


def test_stats_and_compact_say_it_and_go_on(store: Store) -> None:
    with_results(store)
    lose_log(store, "matches/m/pairs")
    counted = stats.run(store.config, store=store.uri)
    assert counted.images == 4 and list(counted.results["parts"]) == ["m"] and not counted.results["matches"]
    merged = compact.run(store.config, store=store.uri)
    assert merged.merged == 4 and merged.exit_code == 0
    for (said,) in (counted.messages, merged.messages):
        assert "matches/m" in said and f"dinoray repair {store.uri}" in said


@pytest.mark.parametrize("table", ["images", "patches"])
def test_a_lost_log_of_images_or_patches_is_found(store: Store, table: str) -> None:
    lose_log(store, table)
    assert f"/{table} is gone" in only_problem(store)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_may_not_be_read_is_an_error_and_no_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    file = file_of(store.patches, "d").path
    opened = parquet.checked_parquet

    def refused(source: Any, **more: Any) -> Any:
        if str(source).endswith(file):
            raise error
        return opened(source, **more)

    monkeypatch.setattr(parquet, "checked_parquet", refused)
    ended = CliRunner().invoke(app, ["verify", store.uri, "--deep"])
    assert ended.exit_code == 1 and ended.stdout == ""
    assert file in ended.stderr and "cannot be read" in ended.stderr and "damaged" not in ended.stderr
