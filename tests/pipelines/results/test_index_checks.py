"""verify on indices: a sound one passes, each way of damaging one is named, one that is behind is a note."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hand_made import add_images, source
from indices_by_hand import change_manifest
from small_runs import settings
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.index import job as index
from pipelines.results import indices as index_files
from pipelines.results.indices import Manifest
from pipelines.store.extraction import drop_images
from pipelines.store.store import Store
from pipelines.upkeep import verify

FLAT, PATCHES = "flat", "parts"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Five images, two indices of two segments, one image taken out."""
    made = Store.create(str(tmp_path / "store"), settings())
    add_images(made, "r1", [source(name, at) for at, name in enumerate("abcdefgh")])
    for name in (FLAT, PATCHES):
        update(made, name)
    add_images(made, "r2", [source("i", 0), source("j", 1)])
    drop_images(made, ["b"], "r3")
    for name in (FLAT, PATCHES):
        update(made, name)
    return made


def update(store: Store, name: str) -> index.Result:
    of = "patches" if name == PATCHES else "embeddings"
    return index.run(settings(f"index.of={of}", "index.kind=flat"), store=store.uri, name=name)


def problems(store: Store) -> list[str]:
    return verify.run(store.config, store=store.uri).problems


def only_problem(store: Store) -> str:
    (problem,) = problems(store)
    return problem


def manifest(store: Store, name: str) -> Manifest:
    found = index_files.read_manifest(store, name)
    assert found is not None
    return found


def folder(store: Store, name: str) -> Path:
    return Path(store.uri) / "index" / name


def edit_manifest(store: Store, name: str, **changes: Any) -> None:
    change_manifest(store, name, lambda content: content.update(changes))


def edit_table(store: Store, name: str, piece: str, change: Callable[[pa.Table], pa.Table], segment: int = 0) -> str:
    """Change a table of a segment, or the dead; the name of its file."""
    of_index = manifest(store, name)
    file = of_index.dead_file if piece == "dead" else of_index.segments[segment].files[piece]
    assert file is not None
    path = folder(store, name) / file
    with pq.ParquetFile(path) as parquet:
        rows = parquet.read()
    pq.write_table(change(rows), path)
    return file


def with_value(column: str, at: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(rows: pa.Table) -> pa.Table:
        content = rows.to_pylist()
        content[at][column] = value
        return pa.Table.from_pylist(content, schema=rows.schema)

    return change


def test_sound_indices_have_no_problem(store: Store) -> None:
    assert [len(manifest(store, name).segments) for name in (FLAT, PATCHES)] == [2, 2]
    without = verify.run(store.config, store=store.uri)
    assert (without.problems, without.messages, without.unreferenced_files) == ([], [], 2)  # older files of the tables
    named = sum(len(manifest(store, name).files) + 1 for name in (FLAT, PATCHES))
    for name in (FLAT, PATCHES):
        for file in folder(store, name).iterdir():
            file.unlink()
    assert without.files - verify.run(store.config, store=store.uri).files == named


def test_an_index_that_is_behind_is_a_note(store: Store) -> None:
    add_images(store, "r4", [source("k", 0), source("l", 1)])
    drop_images(store, ["c"], "r5")
    update(store, PATCHES)
    found = verify.run(store.config, store=store.uri)
    assert found.problems == [] and found.exit_code == 0
    (note,) = found.messages
    assert note.startswith("The index flat is older than the store") and "lacks 2 images, and 1 in it" in note
    shown = CliRunner().invoke(app, ["verify", store.uri])
    assert shown.exit_code == 0 and "is sound" in shown.stdout and "The index flat is older" in shown.stderr


def test_files_that_killed_updates_left_are_counted(store: Store) -> None:
    before = verify.run(store.config, store=store.uri).unreferenced_files
    (folder(store, FLAT) / "20200101T000000Z-abcdef-vectors.faiss").write_bytes(b"half")
    found = verify.run(store.config, store=store.uri)
    assert (found.problems, found.unreferenced_files) == ([], before + 1)


@pytest.mark.parametrize("content", ["{", "[]", '{"of": "embeddings"}', '{"segments": [{}]}'])
def test_a_damaged_manifest_is_named(store: Store, content: str) -> None:
    (folder(store, FLAT) / f"manifest-{manifest(store, FLAT).number}.json").write_text(content)
    assert only_problem(store).startswith("index/flat: ") and "manifest-2.json" in only_problem(store)


def test_an_index_of_another_spec_is_named(store: Store) -> None:
    edit_manifest(store, FLAT, fingerprint="another")
    assert "features of another spec (another" in only_problem(store)


@pytest.mark.parametrize("piece", ["vectors", "images", "cells", "dead"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_file_that_is_missing_or_truncated_is_named(store: Store, piece: str, how: str) -> None:
    of_index = manifest(store, PATCHES)
    file = of_index.dead_file if piece == "dead" else of_index.segments[1].files[piece]
    path = folder(store, PATCHES) / str(file)
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    said = "the file is missing" if how == "missing" else "cannot be read"
    assert only_problem(store).startswith(f"index/parts: {file} ") and said in only_problem(store)


def test_other_columns_are_named(store: Store) -> None:
    file = edit_table(store, FLAT, "images", lambda rows: rows.drop_columns(["run_id"]))
    assert only_problem(store) == (
        f"index/flat: {file} cannot be read (it has other columns than an index has (image_id, first_id, vectors))"
    )


def test_vectors_that_nobody_names_are_named(store: Store) -> None:
    import faiss

    file = folder(store, FLAT) / manifest(store, FLAT).segments[1].files["vectors"]
    vectors = faiss.read_index(str(file))
    vectors.add(vectors.reconstruct_n(0, 1))
    faiss.write_index(vectors, str(file))
    segments = [asdict(segment) | {"checksums": {}} for segment in manifest(store, FLAT).segments]
    edit_manifest(store, FLAT, segments=segments)
    assert "has 3 vectors, the manifest says 2, its images 2" in only_problem(store)


def test_vectors_of_another_length_are_named(store: Store) -> None:
    edit_manifest(store, FLAT, dimension=9)
    assert all("has vectors of 8 values, the index has 9" in problem for problem in problems(store))
    assert len(problems(store)) == 2


def test_cells_of_other_ids_are_named(store: Store) -> None:
    file = edit_table(store, PATCHES, "cells", with_value("id", 3, 98), segment=1)
    assert only_problem(store) == f"index/parts: {file} has other ids than the images of its segment"


def test_images_that_share_ids_are_named(store: Store) -> None:
    edit_table(store, FLAT, "images", with_value("first_id", 4, 3))
    assert "index/flat: images share ids, or are not in their order" in problems(store)


def test_ids_that_were_not_given_yet_are_named(store: Store) -> None:
    edit_manifest(store, FLAT, next_id=9)
    assert only_problem(store) == "index/flat: images share ids, or are not in their order"


@pytest.mark.parametrize("change", [with_value("first_id", 0, 77), with_value("vectors", 0, 2)])
def test_dead_images_that_never_lived_are_named(store: Store, change: Callable[[pa.Table], pa.Table]) -> None:
    file = edit_table(store, FLAT, "dead", change)
    assert f"index/flat: {file} takes out images that the index does not have" in problems(store)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("images", "it has 9 images, its manifest says 5"),
        ("count", "it has 9 vectors, its manifest says 5"),
        ("dead", "it has 1 removed vector, its manifest says 5"),
    ],
)
def test_miscounts_are_named(store: Store, key: str, said: str) -> None:
    edit_manifest(store, FLAT, **{key: 5})
    assert only_problem(store) == f"index/flat: {said}"


def test_an_image_that_is_in_it_twice_is_named(store: Store) -> None:
    edit_table(store, FLAT, "images", with_value("image_id", 0, "i"))
    assert "index/flat: i is in it twice" in problems(store)


def test_images_that_the_table_has_otherwise_are_named(store: Store) -> None:
    edit_table(store, FLAT, "images", with_value("run_id", 0, "another"))
    edit_table(store, FLAT, "images", with_value("image_id", 0, "z"), segment=1)
    assert problems(store) == [
        "index/flat: a is in images, but not in the index",
        "index/flat: i is in images, but not in the index",
        "index/flat: a is in the index, but images does not have it like that",
        "index/flat: z is in the index, but images does not have it like that",
    ]


def test_duckdb_reads_what_is_in_an_index(store: Store) -> None:
    """The tables beside the vectors are plain Parquet, for anyone."""
    import duckdb

    images = [str(folder(store, FLAT) / segment.files["images"]) for segment in manifest(store, FLAT).segments]
    dead = str(folder(store, FLAT) / str(manifest(store, FLAT).dead_file))
    query = f"select image_id from read_parquet({images}) anti join '{dead}' using (first_id) order by first_id"
    assert [row[0] for row in duckdb.sql(query).fetchall()] == list("acdefghij")
    assert pc.count(store.images.read(["image_id"])["image_id"]).as_py() == 9
