"""repair: what each kind of damage comes to, that nothing else is touched, and that a killed run finishes."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import store_commands
from every_step import at_every_step, die
from hand_made import add_images, source
from local_clusters import use_local_workers
from small_results import MATCHES_OF_A_PAIR
from small_runs import settings
from tables_by_hand import commit_by_hand
from two_table_store import files_in
from typer.testing import CliRunner
from whole_stores import IMAGES, NAME, contents, extract, make_results, whole_store

from pipelines.cli import app
from pipelines.errors import JobError
from pipelines.results.clusters import ClusterTables
from pipelines.results.matches import MatchTables
from pipelines.store import publishing
from pipelines.store.store import Store
from pipelines.store.table import Table
from pipelines.upkeep import repair, verify


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store, and what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        use_local_workers(patch)
        store = whole_store(tmp_path_factory.mktemp("template") / "store")
    return Path(store), contents(store)


@pytest.fixture
def store(template: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    use_local_workers(monkeypatch)
    return str(shutil.copytree(template[0], tmp_path / "store"))


@pytest.fixture
def expected(template: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    return template[1]


def repaired(store: str) -> repair.Result:
    """After which nothing is left that verify finds."""
    result = repair.run(settings(), store=store)
    assert result.left == [] and result.exit_code == 0
    assert verify.run(settings(), store=store, deep=True).problems == []
    return result


def ids(store: str) -> list[str]:
    return sorted(Store.open(store, settings()).images.read(["image_id"])["image_id"].to_pylist())


def table_of(store: str, path: str) -> Table:
    opened = Store.open(store, settings())
    if path in ("images", "patches", "failures"):
        return getattr(opened, path)
    kind, name, table = path.split("/")
    tables = {"matches": MatchTables, "clusters": ClusterTables}[kind].open_existing(store, name, {})
    assert tables is not None
    return tables.tables[table]


def first_file(store: str, table: str) -> Path:
    files = table_of(store, table).files()
    return Path(store, table, min(files, key=lambda path: (files[path].min_id, path)))


def damage_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60] ^= 4
    path.write_bytes(content)


# a store that is sound


def test_a_sound_store_is_left_as_it_is(store: str) -> None:
    before = Store.open(store, settings()).log.listing().newest
    result = repaired(store)
    assert (result.status, result.found, result.mends, result.commands) == ("unchanged", 0, [], [])
    assert Store.open(store, settings()).log.listing().newest == before


# damaged files


@pytest.mark.parametrize("damage", [Path.unlink, damage_page, lambda path: path.write_bytes(path.read_bytes()[:40])])
@pytest.mark.parametrize("table", ["images", "patches"])
def test_images_of_a_damaged_file_go_and_are_extracted_again(
    damage: Callable[[Path], None], table: str, store: str, expected: dict[str, Any]
) -> None:
    damage(first_file(store, table))
    result = repaired(store)
    assert ids(store) == list("def")
    assert result.removed["images"] == 3 if table == "patches" else result.removed["patches"] == 12
    assert result.commands == [f"dinoray extract INPUT {store}"]
    extract(store)
    make_results(store)
    assert contents(store) == expected


def test_images_of_one_file_of_many_go_from_the_patches_that_several_share(tmp_path: Path) -> None:
    """As after `compact`: the other images keep their patches, in a copy that their rows name."""
    made = Store.create(str(tmp_path / "store"), settings())
    for number, pair in enumerate(("ac", "bd")):
        add_images(made, f"2026010{number + 1}T000000Z-00000{number}", [source(one) for one in pair])
    CliRunner().invoke(app, ["compact", made.uri])
    add_images(made, "20260103T000000Z-000003", [source("e")])
    CliRunner().invoke(app, ["compact", made.uri])
    made.refresh()
    (file,) = made.images.files()
    rows = made.images.read_file(file)
    Path(made.images.uri, file).write_bytes(b"PAR1")
    assert len(rows) == 5
    result = repaired(made.uri)
    assert ids(made.uri) == [] and (result.removed["patches"], result.removed.get("images")) == (60, 5)


def test_a_damaged_file_of_failures_goes_and_its_images_are_tried_again(store: str, expected: dict[str, Any]) -> None:
    first_file(store, "failures").unlink()
    result = repaired(store)
    assert result.removed == {"failures": 1} and result.commands == [f"dinoray extract INPUT {store}"]
    extract(store)
    assert contents(store) == expected


@pytest.mark.parametrize("table", ["pairs", "matches"])
def test_pairs_of_a_damaged_file_go_and_are_matched_again(table: str, store: str, expected: dict[str, Any]) -> None:
    path = f"matches/{NAME}/{table}"
    damage_page(first_file(store, path))
    result = repaired(store)
    pairs = table_of(store, f"matches/{NAME}/pairs").read(["image_a", "kept"]).to_pylist()
    rows = len(table_of(store, f"matches/{NAME}/matches").read(["rank"]))
    assert 0 < len(pairs) < 15 and rows == MATCHES_OF_A_PAIR * sum(row["kept"] > 0 for row in pairs)
    assert ids(store) == list(IMAGES) and result.commands == [f"dinoray correspond {store} {NAME}"]
    make_results(store)
    assert contents(store) == expected


def test_centroids_are_written_again_from_the_model(store: str, expected: dict[str, Any]) -> None:
    first_file(store, f"clusters/{NAME}/centroids").unlink()
    repaired(store)
    assert contents(store) == expected


def test_assignments_of_a_damaged_file_go_and_the_rest_is_counted_again(store: str, expected: dict[str, Any]) -> None:
    damage_page(first_file(store, f"clusters/{NAME}/assignments"))
    result = repaired(store)
    assert result.removed[f"clusters/{NAME}/assignments"] == 12
    assert result.commands == [f"dinoray cluster {store} {NAME} --update"]
    make_results(store)
    assert contents(store) == expected


@pytest.mark.parametrize("damage", [Path.unlink, damage_page])
def test_clusters_without_their_model_are_trained_again(
    damage: Callable[[Path], None], store: str, expected: dict[str, Any]
) -> None:
    (model,) = Path(store, "clusters", NAME, "model").iterdir()
    damage(model)
    with pytest.raises(JobError, match=r"model.*run `dinoray repair|model.*and `dinoray repair"):
        contents(store)
    result = repaired(store)
    assert not model.exists() and result.commands == [f"dinoray cluster {store} {NAME}"]
    make_results(store)
    assert contents(store) == expected


@pytest.mark.parametrize("file", ["manifest-2.json", "*-vectors.faiss", "*-images.parquet", "*-cells.parquet"])
def test_a_damaged_index_is_built_again(file: str, store: str, expected: dict[str, Any]) -> None:
    folder = Path(store, "index", "cells")
    damage_page(max(folder.glob(file)))
    result = repaired(store)
    assert list(folder.iterdir()) == []
    (command,) = result.commands
    assert command.startswith(f"dinoray index {store} cells")
    if file != "manifest-2.json":  # which says what the index is made of
        assert command.endswith("--set index.of=patches --set index.descriptor=descriptor")
    make_results(store)
    assert contents(store) == expected


# rows that disagree


def test_an_image_that_is_there_twice_goes_and_is_extracted_again(store: str, expected: dict[str, Any]) -> None:
    opened = Store.open(store, settings())
    row = first_file(store, "images")
    again = opened.images.read_file(row.name).slice(0, 1)
    commit_by_hand(opened.images, [opened.images.write_file("part-twice-000000000000.parquet", again)], [], "twice")
    result = repaired(store)
    assert ids(store) == list("bcdef")
    assert result.removed == {"images": 2, "patches": 4}
    extract(store)
    make_results(store)
    assert contents(store) == expected


# logs


@pytest.mark.parametrize(
    ("table", "damage"),
    [
        ("images", "lost"),
        ("images", "short"),
        ("patches", "cut"),
        ("failures", "short"),
        (f"parts/{NAME}/images", "lost"),
        (f"clusters/{NAME}/centroids", "cut"),
    ],
)
def test_a_damaged_log_is_written_again_from_the_transactions(
    table: str, damage: str, store: str, expected: dict[str, Any]
) -> None:
    folder = Path(store, table, "_delta_log")
    names = sorted(path.name for path in folder.glob("*.json"))
    if damage == "lost":
        shutil.rmtree(folder)
    elif damage == "cut":
        (folder / names[0]).write_bytes((folder / names[0]).read_bytes()[:100])
    else:
        (folder / names[-1]).unlink()
    assert verify.run(settings(), store=store).problems
    result = repaired(store)
    assert result.removed == {} and result.commands == []
    assert contents(store) == expected


@pytest.mark.parametrize(
    ("table", "advice"),
    [
        ("images", "restore it from a copy of the store, or extract into another STORE"),
        ("failures", "and the next extract tries again whatever failed"),
        (f"parts/{NAME}/images", f"and run `dinoray cosegment {{store}} {NAME}`, which makes it again"),
    ],
)
def test_a_log_whose_transactions_are_gone_is_left_and_said(table: str, advice: str, store: str) -> None:
    """What else is damaged is mended all the same, where it does not hang on that table."""
    for name in sorted(Path(store, "transactions").iterdir())[:-2]:  # those of the newest stay
        name.unlink()
    shutil.rmtree(Path(store, table, "_delta_log"))
    (model,) = Path(store, "clusters", NAME, "model").iterdir()
    model.unlink()
    result = repair.run(settings(), store=store)
    assert (result.mended, result.exit_code, len(result.left)) == (1, 1, 1)
    assert advice.format(store=store) in result.left[0] and result.removed
    (problem,) = verify.run(settings(), store=store, deep=True).problems
    assert problem.rstrip(".") in result.left[0]


def test_a_file_that_a_log_names_otherwise_is_found_and_comes_back(store: str, expected: dict[str, Any]) -> None:
    """A bit of a name flipped in the log of the table."""
    file = first_file(store, "failures").name
    for log in Path(store, "failures", "_delta_log").glob("*.json"):
        log.write_text(log.read_text().replace(file, file.replace("part", "qart")))
    result = repaired(store)
    assert result.removed == {} and contents(store) == expected


@pytest.mark.parametrize("damage", [damage_page, Path.unlink])
def test_a_damaged_transaction_is_written_again_or_goes(
    damage: Callable[[Path], None], store: str, expected: dict[str, Any]
) -> None:
    names = sorted(Path(store, "transactions").glob("*.json"))
    damage(names[-1])
    with pytest.raises(JobError, match="dinoray repair"):
        contents(store)
    repaired(store)
    make_results(store)  # the index that it moved is found as it was before
    assert contents(store) == expected
    damage_page(names[4])
    repaired(store)
    assert not names[4].exists() and contents(store) == expected


def test_a_change_whose_writer_was_killed_is_completed(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = publishing._commit

    def killed(log: Any, delta: Any, *more: Any) -> None:
        if delta.table_uri.rstrip("/").endswith("images"):
            raise KeyboardInterrupt
        commit(log, delta, *more)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "_commit", killed)
        with pytest.raises(KeyboardInterrupt):
            add_images(Store.open(store, settings()), "20260201T000000Z-000000", [source("z")])
    assert "z" not in ids(store)
    (sentence,) = repaired(store).mends
    assert "is not completed: it is completed" in sentence and "z" in ids(store)


# what cannot be mended


def test_a_damaged_description_is_a_sentence(store: str) -> None:
    path = Path(store, "store.json")
    sound = path.read_text()
    path.write_text(sound.replace('"every": 1', '"every": 2'))
    for command in ("verify", "repair", "stats"):
        ended = CliRunner().invoke(app, [command, store])
        assert ended.exit_code == 1 and "store.json is damaged" in ended.stderr and "Traceback" not in ended.output


def test_settings_that_a_result_was_made_with(store: str) -> None:
    path = Path(store, "parts", NAME, "settings.json")
    path.write_text("{")
    result = repair.run(settings(), store=store)
    assert result.exit_code == 1 and "settings.json" in result.left[0] and "dinoray cosegment" in result.left[0]


# how it goes


def test_a_dry_run_says_it_and_writes_nothing(store: str) -> None:
    first_file(store, "patches").unlink()
    before = sorted(files_in(Store.open(store, settings()).log))
    shown = CliRunner().invoke(app, ["repair", store, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "would be mended: patches: part-" in shown.stdout and "Nothing was written." in shown.stdout
    assert f"dinoray extract INPUT {store}" in shown.stdout
    assert sorted(files_in(Store.open(store, settings()).log)) == before


def test_what_is_printed(store: str) -> None:
    first_file(store, "patches").unlink()
    shown = CliRunner().invoke(app, ["repair", store])
    assert shown.exit_code == 0, shown.output
    assert "mended: patches: part-" in shown.stdout and "3 rows removed from images." in shown.stdout
    assert f"{store} is sound: 1 finding mended" in shown.stdout
    as_json = json.loads(CliRunner().invoke(app, ["repair", store, "--json"]).stdout)
    assert (as_json["status"], as_json["sound"], as_json["found"]) == ("unchanged", True, 0)


def small_store(folder: Path) -> Path:
    """Images in several files of which one is damaged, and nothing else."""
    opened = store_commands.new_store(folder)
    damage_page(first_file(opened.uri, "patches"))
    return folder


def test_killed_at_every_step_the_same_command_finishes(tmp_path: Path) -> None:
    begin = small_store(tmp_path / "begin")
    for killed in at_every_step(begin, tmp_path / "copies", lambda one: repair.run(settings(), store=one), die):
        repaired(killed)
        assert ids(killed) == ["b", "d"]


def test_two_repairs_at_once_do_it_once(tmp_path: Path) -> None:
    begin = small_store(tmp_path / "begin")
    for copy in at_every_step(begin, tmp_path / "copies", lambda one: repair.run(settings(), store=one), repaired):
        assert verify.run(settings(), store=copy, deep=True).problems == []
        assert ids(copy) == ["b", "d"]


@pytest.mark.parametrize("command", ["extract", "prune", "compact"])
def test_beside_another_command_at_every_step(command: str, tmp_path: Path) -> None:
    """Which fails with a sentence where it meets the damage first, and nothing of it is lost."""
    begin = small_store(tmp_path / "begin")

    def other(store: str) -> None:
        with contextlib.suppress(JobError):
            store_commands.COMMANDS[command](store)

    for copy in at_every_step(begin, tmp_path / "copies", lambda one: repair.run(settings(), store=one), other):
        repaired(copy)
        found = ids(copy)
        assert {"b", "d"} <= set(found) and "a" not in found


@pytest.mark.slow
@pytest.mark.parametrize("tables", [("patches", f"matches/{NAME}/pairs"), ("images", f"clusters/{NAME}/assignments")])
def test_a_store_with_results_repaired_by_a_run_that_was_killed_is_made_whole(
    tables: tuple[str, ...], store: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    for table in tables:
        damage_page(first_file(store, table))
    begin = Path(store).rename(tmp_path / "begin")
    for killed in at_every_step(begin, tmp_path / "copies", lambda one: repair.run(settings(), store=one), die):
        repaired(killed)
        extract(killed)
        make_results(killed)
        assert contents(killed) == expected
        shutil.rmtree(killed)


def test_the_store_of_these_tests_is_the_same_when_it_is_made_again(store: str, expected: dict[str, Any]) -> None:
    extract(store)
    make_results(store)
    assert contents(store) == expected
