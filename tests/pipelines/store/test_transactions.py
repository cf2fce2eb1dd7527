"""The one door, with real tables: a change, lost answers, stores from before transactions, damage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from changes_in_steps import commits_in_order
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError
from tables_by_hand import commit_by_hand, made_table
from two_table_store import (
    SCHEMA,
    TABLES,
    Images,
    compact,
    files_in,
    fresh,
    holds,
    put_images,
    replacing,
    seen_by_a_reader,
    write,
)

from pipelines.errors import JobError, RequestError
from pipelines.storage import conditional
from pipelines.store import transaction_log
from pipelines.store.changes import Change, Pointer, TableChange
from pipelines.store.snapshots import Snapshot, snapshot
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import transact

# A change, whole


def test_a_change_is_in_every_table_and_in_the_log(log: TransactionLog) -> None:
    assert put_images(log, {"a": 0, "b": 0}) == 1
    assert put_images(log, {"b": 1, "c": 0}, command="extract again") == 2
    holds(log, {"a": 0, "b": 1, "c": 0})
    content = json.loads(Path(log.uri_of(2)).read_bytes())
    assert (content["number"], content["planned_at"], content["command"]) == (2, 1, "extract again")
    assert [one["table"] for one in content["tables"]] == list(TABLES)
    (images,) = [one for one in content["tables"] if one["table"] == "images"]
    assert [(file["rows"], file["min"], file["max"]) for file in images["add"]] == [(2, "b", "c"), (1, "a", "a")]
    assert len(images["remove"]) == 1 and not images["rearranges"]
    for table in TABLES:
        assert DeltaTable(f"{log.uri}/{table}").transaction_version("dinoray") == 2


@pytest.mark.parametrize("order", [TABLES, TABLES[::-1]], ids=" then ".join)
def test_tables_are_published_in_the_order_of_the_change(log: TransactionLog, order: tuple[str, ...]) -> None:
    """By its writer, and by whoever completes it."""
    change = Change([TableChange(table, SCHEMA, [write(log, table, {"a": 0})]) for table in order])
    with commits_in_order(log.uri) as committed:
        transact(log, lambda _: change, run_id="r", command="extract")
    assert committed == list(order)
    for table in order:
        shutil.rmtree(Path(log.uri, table, "_delta_log"))
    Path(log.uri_of(1, "published")).unlink()
    with commits_in_order(log.uri) as committed:
        put_images(fresh(log), {"a": 0})
    assert committed == list(order)


def test_a_writer_knows_the_files_that_its_own_commits_and_those_of_others_left(log: TransactionLog) -> None:
    """Files of a version are remembered from the one before: the same as whoever opens the table reads."""
    other = TransactionLog(log.uri)

    def known(log: TransactionLog) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def build(current: Snapshot) -> None:
            seen.update({table: dict(current.files(table)) for table in ("images", "patches")})

        transact(log, build, run_id="run", command="test")
        return seen

    for writer, images in [
        (log, {"a": 0, "b": 0}),
        (log, {"a": 1, "c": 0}),
        (other, {"b": 1}),
        (log, {"b": 2, "d": 0}),
        (other, {"a": 2, "d": 1}),
    ]:
        put_images(writer, images)
        fresh = snapshot(TransactionLog(log.uri))
        expected = {table: dict(fresh.files(table)) for table in ("images", "patches")}
        assert known(log) == known(other) == expected


def test_nothing_to_do_writes_nothing(log: TransactionLog) -> None:
    assert transact(log, lambda _: None, run_id="r", command="extract") is None
    assert not Path(log.uri).exists()
    put_images(log, {"a": 0})
    before = files_in(log)
    assert put_images(log, {"a": 0}) is None
    assert {path for path in files_in(log) - before if not path.endswith(".parquet")} == set()


def test_readers_make_nothing(log: TransactionLog, tmp_path: Path) -> None:
    current = snapshot(log)
    assert (current.number, current.table("images"), dict(current.files("images"))) == (0, None, {})
    assert not Path(log.uri).exists()
    put_images(log, {"a": 0})
    before = files_in(log)
    assert seen_by_a_reader(log) == {"a": 0} and snapshot(log).table("parts/x/images") is None
    assert files_in(log) == before


def test_a_change_that_does_not_fit_its_snapshot_is_refused(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    file = write(log, "images", {"b": 0})

    def ask(change: TableChange) -> None:
        transact(log, lambda _: Change([change]), run_id="r", command="c")

    with pytest.raises(ValueError, match=r"removes gone\.parquet from images"):
        ask(TableChange("images", SCHEMA, [], ["gone.parquet"]))
    with pytest.raises(ValueError, match="which has it already"):
        ask(TableChange("images", SCHEMA, list(snapshot(log).files("images").values())))
    with pytest.raises(ValueError, match="names a file twice"):
        ask(TableChange("images", SCHEMA, [file, file]))
    path = Path(log.uri, "images", file.path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JobError, match=rf"has {file.size - 1} bytes where {file.size} were written"):
        ask(TableChange("images", SCHEMA, [file]))
    path.unlink()
    with pytest.raises(JobError, match=r"is gone: .*Run the same command again"):
        ask(TableChange("images", SCHEMA, [file]))
    holds(log, {"a": 0})


def test_pointers_move_with_the_change_and_stay(log: TransactionLog) -> None:
    folder = Path(log.uri, "index", "photos")
    folder.mkdir(parents=True)
    for name in ("manifest-1.json", "manifest-2.json", "a.faiss"):
        (folder / name).write_text(name)

    def move(to: Pointer | None) -> None:
        transact(log, lambda _: Change(pointers={"index/photos": to}), run_id="r", command="index")

    first = Pointer("index/photos/manifest-1.json", "sha256:1", ("index/photos/a.faiss",))
    second = Pointer("index/photos/manifest-2.json", "sha256:2", ("index/photos/a.faiss",))
    move(first)
    put_images(log, {"a": 0})
    held = snapshot(log)
    assert dict(held.pointers) == {"index/photos": first}
    move(second)
    assert dict(held.pointers) == {"index/photos": first} and dict(snapshot(log).pointers) == {"index/photos": second}
    with pytest.raises(JobError, match="gone"):
        move(Pointer("index/photos/manifest-3.json"))
    move(None)
    assert dict(snapshot(fresh(log)).pointers) == {}


# Lost answers


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("landed", [True, False], ids=["answer lost", "request lost"])
def test_a_put_without_an_answer_happens_once(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch, landed: bool
) -> None:
    put_images(log, {"a": 0})
    original, lost = conditional.put_if_absent, list[str]()

    def put(uri: str, data: bytes, options: Any = None) -> bool:
        if not lost:
            lost.append(uri)
            if landed:
                original(uri, data, options)
            raise TimeoutError("the storage did not answer")
        return original(uri, data, options)

    monkeypatch.setattr(transaction_log, "put_if_absent", put)
    assert put_images(log, {"a": 1, "b": 0}) == 2
    assert lost == [log.uri_of(2)]
    holds(log, {"a": 1, "b": 0})


@pytest.mark.usefixtures("quick")
def test_a_put_that_another_overtook_while_its_answer_was_lost(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, lost = conditional.put_if_absent, list[str]()

    def put(uri: str, data: bytes, options: Any = None) -> bool:
        if not lost:
            lost.append(uri)
            put_images(fresh(log), {"a": 0, "c": 0})
            raise TimeoutError("the storage did not answer")
        return original(uri, data, options)

    monkeypatch.setattr(transaction_log, "put_if_absent", put)
    assert put_images(log, {"a": 0, "b": 0}) == 2
    holds(log, {"a": 0, "b": 0, "c": 0})


@pytest.mark.usefixtures("quick")
def test_storage_that_stays_away_is_one_sentence(log: TransactionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(*_: Any) -> bool:
        raise TimeoutError("the storage did not answer")

    monkeypatch.setattr(transaction_log, "put_if_absent", put)
    with pytest.raises(JobError, match="could not be reached, or stopped answering"):
        put_images(log, {"a": 0})
    monkeypatch.undo()
    put_images(log, {"a": 0})
    holds(log, {"a": 0})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("at", [0, 1], ids=TABLES)
@pytest.mark.parametrize("landed", [True, False], ids=["answer lost", "request lost"])
@pytest.mark.parametrize("error", [CommitFailedError("0"), OSError("Generic S3 error: broken off")], ids=["own", "s3"])
def test_a_commit_without_an_answer_is_made_once(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch, at: int, landed: bool, error: Exception
) -> None:
    put_images(log, {"a": 0})
    original, calls = DeltaTable.create_write_transaction, list[int]()

    def commit(delta: DeltaTable, *arguments: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) != at + 1:
            return original(delta, *arguments, **named)
        if landed:
            original(delta, *arguments, **named)
        raise error

    monkeypatch.setattr(DeltaTable, "create_write_transaction", commit)
    assert put_images(log, {"a": 1, "b": 0}) == 2
    assert {DeltaTable(f"{log.uri}/{table}").version() for table in TABLES} == {2}
    holds(log, {"a": 1, "b": 0})


@pytest.mark.usefixtures("quick")
def test_other_programs_that_commit_again_and_again_only_delay_it(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(log, {"a": 0})
    original, others = DeltaTable.create_write_transaction, list[int]()

    def commit(delta: DeltaTable, *arguments: Any, **named: Any) -> None:
        if len(others) < 7:
            others.append(1)
            DeltaTable(delta.table_uri).alter.set_table_properties({"delta.checkpointInterval": str(50 + len(others))})
        original(delta, *arguments, **named)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", commit)
    assert put_images(log, {"a": 1, "b": 0}) == 2
    assert len(others) == 7
    holds(log, {"a": 1, "b": 0})


@pytest.mark.usefixtures("quick")
def test_a_table_that_cannot_be_written_is_completed_by_the_next_command(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(log, {"a": 0})
    original = DeltaTable.create_write_transaction

    def commit(delta: DeltaTable, *arguments: Any, **named: Any) -> None:
        if "images" in delta.table_uri:
            raise OSError("Generic S3 error: broken off")
        original(delta, *arguments, **named)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", commit)
    with pytest.raises(JobError, match="run the same command again, which completes it"):
        put_images(log, {"a": 1, "b": 0})
    assert seen_by_a_reader(log) == {"a": 0}
    monkeypatch.undo()
    assert put_images(fresh(log), {"a": 1, "b": 0}) is None
    holds(log, {"a": 1, "b": 0})


def by_another_program(log: TransactionLog, table: str, images: Images) -> None:
    """Rows appended by a writer of Delta tables that knows nothing of transactions."""
    rows = pa.table({"image_id": list(images), "version": list(images.values())}, SCHEMA)
    write_deltalake(f"{log.uri}/{table}", rows, mode="append")


@pytest.mark.usefixtures("quick")
def test_a_commit_goes_on_top_of_the_version_that_was_read_and_no_other(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of its content is of that version: with another program's rows below it, indices would stay as they
    are, and those rows would be in none."""
    put_images(log, {"a": 0})
    put_images(log, {"b": 0})
    before = made_table(f"{log.uri}/images", SCHEMA).content_version
    original, refused = DeltaTable.create_write_transaction, list[str]()

    def commit(delta: DeltaTable, *arguments: Any, **named: Any) -> None:
        if "images" in delta.table_uri and not refused:
            by_another_program(log, "images", {"c": 0})
            try:
                original(delta, *arguments, **named)
            except CommitFailedError as error:
                refused.append(str(error))
                raise
        original(delta, *arguments, **named)

    monkeypatch.setattr(DeltaTable, "create_write_transaction", commit)
    compact(log)
    after = made_table(f"{log.uri}/images", SCHEMA)
    assert len(refused) == 1 and after.version == before + 2
    assert after.content_version == before + 1, "the other program's version"


def test_no_commit_removes_older_ones_behind_a_checkpoint(log: TransactionLog) -> None:
    """Readers of older snapshots need them, whatever a table says of how long its log is kept."""
    put_images(log, {"0": 0})
    held = snapshot(log)
    table = DeltaTable(f"{log.uri}/images")
    keep_nothing = {"delta.logRetentionDuration": "interval 0 seconds", "delta.enableExpiredLogCleanup": "true"}
    table.alter.set_table_properties({"delta.checkpointInterval": "2", **keep_nothing})
    for name in (folder := Path(log.uri, "images", "_delta_log")).iterdir():
        os.utime(name, (0, 0))
    for at in range(1, 6):
        put_images(log, {str(at): 0})
    assert list(folder.glob("*.checkpoint.parquet")), "a checkpoint stands for the commits before it"
    newest = DeltaTable(f"{log.uri}/images").version()
    assert len(list(folder.glob("*.json"))) == newest + 1
    assert len(held.files("images")) == 1


# Stores from before transactions, damage, storage


def store_from_before(log: TransactionLog) -> None:
    for table in TABLES:
        made = made_table(f"{log.uri}/{table}", SCHEMA)
        commit_by_hand(made, [write(log, table, {"a": 0}), write(log, table, {"b": 0})], [], "old")


def test_a_store_from_before_is_read_and_brought_up_by_its_first_writer(log: TransactionLog) -> None:
    store_from_before(log)
    assert seen_by_a_reader(log) == {"a": 0, "b": 0} and snapshot(log).number == 0
    assert transact(log, lambda _: Change(), run_id="r", command="extract") == 1
    assert put_images(log, {"a": 1, "c": 0}) == 2
    holds(log, {"a": 1, "b": 0, "c": 0})
    assert set(made_table(f"{log.uri}/images", SCHEMA).read(["version"])["version"].to_pylist()) == {0, 1}


def test_a_reader_of_a_store_from_before_while_its_first_transaction_is_on_its_way(log: TransactionLog) -> None:
    store_from_before(log)
    seen: list[Images] = []
    original = DeltaTable.create_write_transaction

    def commit(delta: DeltaTable, *arguments: Any, **named: Any) -> None:
        seen.append(seen_by_a_reader(log))
        original(delta, *arguments, **named)
        seen.append(seen_by_a_reader(log))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DeltaTable, "create_write_transaction", commit)
        put_images(log, {"a": 1})
    assert seen == [{"a": 0, "b": 0}] * 4, "before and after each of two commits"
    holds(log, {"a": 1, "b": 0})


def test_compacting_leaves_the_version_of_the_content(log: TransactionLog) -> None:
    """Which indices and jobs of older versions go by; where older commits are gone behind a checkpoint too."""
    put_images(log, {"a": 0})
    put_images(log, {"b": 0})
    before = made_table(f"{log.uri}/images", SCHEMA).content_version
    compact(log)
    said = Path(log.uri, "images", "_delta_log", f"{3:020}.json").read_text()
    assert said.count('"dataChange":false') == 3 and '"dataChange":true' not in said, "two files merged into one"
    (merged,) = snapshot(log).files("images")
    copy = write(log, "images", {"a": 0, "b": 0})
    change = Change([TableChange("images", SCHEMA, [copy], [merged], rearranges=True)])
    transact(log, lambda _: change, run_id="r", command="compact")
    DeltaTable(f"{log.uri}/images").create_checkpoint()
    for version in range(4):
        Path(log.uri, "images", "_delta_log", f"{version:020}.json").unlink()
    after = made_table(f"{log.uri}/images", SCHEMA)
    assert after.version == before + 2 and after.content_version == before


def test_the_number_survives_checkpoints(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    put_images(log, {"b": 0})
    for table in TABLES:
        DeltaTable(f"{log.uri}/{table}").create_checkpoint()
        for version in (0, 1):
            Path(log.uri, table, "_delta_log", f"{version:020}.json").unlink()
    Path(log.uri_of(2, "published")).unlink()
    assert put_images(fresh(log), {"c": 0}) == 3
    holds(log, {"a": 0, "b": 0, "c": 0})


def test_a_folder_that_was_removed_by_hand_is_not_made_again(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    file = write(log, "parts/x/images", {"a": 0})
    change = Change([TableChange("parts/x/images", SCHEMA, [file])])
    transact(log, lambda _: change, run_id="r", command="cosegment")
    Path(log.uri_of(2, "published")).unlink()  # killed at its very end
    shutil.rmtree(Path(log.uri, "parts"))
    put_images(log, {"b": 0})
    assert not Path(log.uri, "parts").exists()
    holds(log, {"a": 0, "b": 0})


def test_damaged_and_newer_logs_are_one_sentence(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    path = Path(log.uri_of(1))
    sound = json.loads(path.read_bytes())
    path.write_text(json.dumps(sound | {"run_id": "another"}))
    with pytest.raises(JobError, match=r"is damaged \(it has another checksum"):
        snapshot(log)
    del sound["checksum"]
    for content, error in (
        (b"", "is damaged"),
        (b"[]", "is damaged"),
        (b'{"format": 1}', "is damaged"),
        (json.dumps(sound | {"sweep": ["../x"]}).encode(), "lies outside the store"),
        (json.dumps(sound | {"tables": [sound["tables"][0] | {"table": "/etc"}]}).encode(), "lies outside the store"),
    ):
        path.write_bytes(content)
        for use in (lambda: snapshot(log), lambda: put_images(log, {"b": 0})):
            with pytest.raises(JobError, match=error):
                use()
    path.write_text(json.dumps(sound | {"format": 99}))
    with pytest.raises(RequestError, match="newer dinoray"):
        snapshot(log)


def test_a_log_that_lost_its_end_is_noticed(log: TransactionLog) -> None:
    """Its numbers would be used again, and the tables take them for changes that they have."""
    for image_id in "ab":
        put_images(log, {image_id: 0})
    shutil.move(log.folder, f"{log.folder}.away")
    for use in (lambda: seen_by_a_reader(log), lambda: put_images(log, {"c": 0})):
        with pytest.raises(JobError, match=r"has transaction 2, and .* ends at 0: .*restore it whole"):
            use()
    shutil.move(f"{log.folder}.away", log.folder)
    holds(log, {"a": 0, "b": 0})


def test_a_table_that_was_put_back_is_noticed(log: TransactionLog, tmp_path: Path) -> None:
    put_images(log, {"a": 0})
    shutil.copytree(f"{log.uri}/images", tmp_path / "images")
    put_images(log, {"b": 0})
    shutil.rmtree(f"{log.uri}/images")
    shutil.copytree(tmp_path / "images", f"{log.uri}/images")
    for use in (lambda: seen_by_a_reader(log), lambda: put_images(log, {"c": 0})):
        with pytest.raises(JobError, match=r"images does not have transaction 2, .*dinoray repair"):
            use()


def test_a_damaged_table_is_one_sentence(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    Path(log.uri, "images", "_delta_log", f"{1:020}.json").write_bytes(b"\0" * 400)
    for use in (lambda: snapshot(log).files("images"), lambda: put_images(log, {"b": 0})):
        with pytest.raises(JobError, match=r"The log of .*/images is damaged .*dinoray repair"):
            use()


def test_storage_without_put_if_absent_is_noticed_and_said_once(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(uri: str, data: bytes, options: Any = None) -> bool:
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        Path(uri).write_bytes(data)  # as a server does that pays no heed to If-None-Match
        return True

    monkeypatch.setattr(conditional, "put_if_absent", put)
    monkeypatch.setattr(transaction_log, "put_if_absent", put)
    put_images(log, {"a": 0})
    put_images(log, {"a": 1})
    (message,) = log.messages
    assert "one command that writes to this store at a time" in message
    monkeypatch.undo()
    holds(log, {"a": 1})
    other = fresh(log)
    put_images(other, {"b": 0})
    assert other.messages == []
    assert not [path for path in files_in(log) if "probe" in path or "partial" in path]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = TransactionLog(str(tmp_path / "store"))

    def link(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    build = replacing(log, {"a": 0})
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(JobError, match="is full"):
        transact(log, build, run_id="r", command="extract")


def test_keys_need_not_be_text(log: TransactionLog) -> None:
    schema = pa.schema([("cluster_id", pa.int32()), ("size", pa.int64())])
    from pipelines.store.parquet import new_file_name, write_parquet

    rows = pa.table({"cluster_id": [0, 1], "size": [3, 4]}, schema)
    file = write_parquet(f"{log.uri}/clusters/words/centroids", new_file_name("r"), rows)
    change = Change([TableChange("clusters/words/centroids", schema, [file])])
    transact(log, lambda _: change, run_id="r", command="cluster")
    opened = snapshot(log).table("clusters/words/centroids", schema)
    assert opened and opened.read(["cluster_id", "size"]).equals(rows)
    (held,) = snapshot(log).files("clusters/words/centroids").values()
    assert (held.min_id, held.max_id) == (0, 1)
