"""The one door, with real tables: killed at every step, paused at every step, in races, on a disk and on S3."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from power_cuts import cut_power, make_disk, mounted_disk
from s3_server import BUCKET, S3Server
from small_changes import (
    SCHEMA,
    TABLES,
    Images,
    compact,
    drop_images,
    holds,
    put_images,
    replacing,
    seen_by_a_reader,
    sweep,
    write,
)
from trials import KILLED, Trials, at_step

from pipelines.errors import JobError, RequestError
from pipelines.storage import conditional
from pipelines.store import publishing, transaction_log
from pipelines.store.changes import Change, Pointer, TableChange
from pipelines.store.garbage import garbage
from pipelines.store.snapshots import snapshot
from pipelines.store.table import Table
from pipelines.store.transaction_log import TransactionLog
from pipelines.store.transactions import open_for_writing, transact

LONGEST = 200  # steps of one change
DAY = 24 * 3600.0


@pytest.fixture
def log(tmp_path: Path) -> TransactionLog:
    return TransactionLog(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    server = Trials()
    yield server
    server.close()


def fresh(log: TransactionLog) -> TransactionLog:
    """As another process opens it."""
    return TransactionLog(log.uri, log.options)


def in_other_words(log: TransactionLog, images: Images) -> None:
    """Every image of a store in one file more, by a transaction each: what is to be compacted."""
    for image_id, version in images.items():
        put_images(log, {image_id: version})


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


def test_nothing_to_do_writes_nothing(log: TransactionLog) -> None:
    assert transact(log, lambda _: None, run_id="r", command="extract") is None
    assert not Path(log.uri).exists()
    put_images(log, {"a": 0})
    before = files_in(log)
    assert put_images(log, {"a": 0}) is None
    assert {path for path in files_in(log) - before if not path.endswith(".parquet")} == set()


def files_in(log: TransactionLog) -> set[str]:
    return {os.path.join(folder, name) for folder, _, names in os.walk(log.uri) for name in names}


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


# Killed at every step


CHANGES: dict[str, tuple[str, dict[str, Any], Images]] = {
    "the first change of a new store": ("put", {"images": [{"c": 0}]}, {"c": 0}),
    "new, replaced and copied rows": ("put", {"images": [{"a": 1, "c": 0}]}, {"a": 1, "b": 0, "c": 0, "d": 0}),
    "compact": ("compact", {}, {"a": 0, "b": 0, "d": 0}),
    "sweep": ("sweep", {}, {"a": 0, "b": 0, "d": 0}),
}


def kill_everywhere(trials: Trials, new_store: Callable[[], TransactionLog], name: str) -> int:
    """Kill a change at each of its steps, each time in a store of its own; the number of steps."""
    change, arguments, wanted = CHANGES[name]
    for step in itertools.count():
        log = new_store()
        before = seen_by_a_reader(log)
        if name == "sweep":
            leftovers = [write(log, table, {"x": 9}).path for table in TABLES]
        code = trials.run(change, store=log.uri, options=log.options, die_at=step, **arguments)
        assert code in (0, KILLED), f"step {step}"
        found = seen_by_a_reader(log)
        assert found in (before, wanted), f"step {step}: a reader sees {found}"
        put_images(fresh(log), {"z": 0})  # another process opens the store, finishes, and does something of its own
        assert seen_by_a_reader(log) in (before | {"z": 0}, wanted | {"z": 0}), f"step {step}"
        if change == "put":
            put_images(fresh(log), arguments["images"][0])  # and the same command again
        if change == "compact":
            compact(fresh(log))
        if name == "sweep":
            sweep(fresh(log))
            fs, _ = transaction_log.filesystem(log.uri, log.options)
            gone = [f"{log.uri}/{table}/{path}" for table, path in zip(TABLES, leftovers, strict=True)]
            assert not any(fs.exists(path) for path in gone)
        holds(log, wanted | {"z": 0})
        if code == 0:
            return step
        assert step < LONGEST
    raise AssertionError("unreachable")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("compact", "sweep") else ()) for name in CHANGES]
)
def test_killed_at_every_step(trials: Trials, tmp_path: Path, name: str) -> None:
    template = TransactionLog(str(tmp_path / "template"))
    if name != "the first change of a new store":
        with_old_images(template)

    def new_store() -> TransactionLog:
        log = TransactionLog(str(tmp_path / uuid.uuid4().hex))
        if Path(template.uri).exists():
            shutil.copytree(template.uri, log.uri)
        return log

    assert kill_everywhere(trials, new_store, name) >= (5 if name == "sweep" else 10)


def with_old_images(log: TransactionLog) -> TransactionLog:
    put_images(log, {"a": 0, "b": 0})
    put_images(log, {"d": 0})
    return log


# Paused at every step


def pause_everywhere(
    tmp_path: Path, start: Images, change: Callable[[TransactionLog], Any], other: Callable[[TransactionLog], Any]
) -> Iterator[tuple[TransactionLog, list[str]]]:
    """Stores in which `other` ran whole while `change` stood at one of its steps, reading ones too."""
    for step in range(LONGEST):
        log = TransactionLog(str(tmp_path / uuid.uuid4().hex))
        in_other_words(log, start)
        # what is bound now is bound for the steps that follow
        with at_step(step, lambda log=log: other(fresh(log)), reads=True) as taken:  # type: ignore[misc]
            change(fresh(log))
        if len(taken) <= step:
            return
        yield log, taken
    raise AssertionError(f"more than {LONGEST} steps")


def test_paused_at_every_step_while_another_adds(tmp_path: Path) -> None:
    paused = pause_everywhere(
        tmp_path, {"a": 0}, lambda log: put_images(log, {"b": 0}), lambda log: put_images(log, {"c": 0})
    )
    steps = 0
    for log, taken in paused:
        holds(log, {"a": 0, "b": 0, "c": 0})
        steps = len(taken)
    assert steps > 15


def test_paused_at_every_step_while_another_makes_the_same(tmp_path: Path) -> None:
    """Two commands over the same images, one of them changed: who comes second drops what is done elsewhere."""
    paused = pause_everywhere(
        tmp_path, {"a": 0}, lambda log: put_images(log, {"a": 1, "b": 0}), lambda log: put_images(log, {"a": 1, "c": 0})
    )
    for log, _ in paused:
        holds(log, {"a": 1, "b": 0, "c": 0})


def test_compact_paused_at_every_step_gives_way(tmp_path: Path) -> None:
    """To one that replaces an image whose file is being merged: old rows do not come back."""
    outcomes = set()

    def merge(log: TransactionLog) -> None:
        outcomes.add(compact(log) is not None)

    for log, taken in pause_everywhere(tmp_path, {"a": 0, "b": 0}, merge, lambda log: put_images(log, {"a": 1})):
        holds(log, {"a": 1, "b": 0})
        assert taken
    assert outcomes == {True, False}, "compact came first at some steps and gave way at others"


def test_a_replacement_paused_at_every_step_of_it_while_compact_runs(tmp_path: Path) -> None:
    """What it had rewritten is merged under it: it looks again and rewrites the merged file."""
    paused = pause_everywhere(tmp_path, {"a": 0, "b": 0}, lambda log: put_images(log, {"a": 1}), compact)
    for log, _ in paused:
        holds(log, {"a": 1, "b": 0})


def test_prune_paused_at_every_step_while_another_adds(tmp_path: Path) -> None:
    paused = pause_everywhere(
        tmp_path, {"a": 0, "b": 0}, lambda log: drop_images(log, ["a"]), lambda log: put_images(log, {"c": 0})
    )
    for log, _ in paused:
        holds(log, {"b": 0, "c": 0})


def test_paused_at_every_step_while_another_sweeps_all_that_is_unnamed(tmp_path: Path) -> None:
    """Without any retention, files that are about to be named are swept too: the command fails with a sentence, or is
    whole. What never happens is a table that names a file which is gone."""
    failed = []

    def change(log: TransactionLog) -> None:
        try:
            put_images(log, {"b": 0})
        except FileNotFoundError:  # swept while it was being written, which its writer finds
            put_images(log, {"b": 0})
        except JobError as error:
            assert "Run the same command again" in str(error)
            failed.append(error)
            put_images(log, {"b": 0})

    for log, _ in pause_everywhere(tmp_path, {"a": 0}, change, lambda log: sweep(log)):
        holds(log, {"a": 0, "b": 0})
    assert failed, "some step lies between the writing of a file and its naming"


def test_a_reader_at_every_step_sees_one_transaction(tmp_path: Path) -> None:
    """Between two publishes too: what it sees is before or after, and after never goes back to before."""
    for step in range(LONGEST):
        log = TransactionLog(str(tmp_path / uuid.uuid4().hex))
        put_images(log, {"a": 0, "b": 0})
        seen: list[Images] = []
        with at_step(step, lambda log=log, seen=seen: seen.append(seen_by_a_reader(log))) as taken:  # type: ignore[misc]
            put_images(log, {"a": 1, "c": 0})
        if len(taken) <= step:
            return
        assert seen in ([{"a": 0, "b": 0}], [{"a": 1, "b": 0, "c": 0}])
    raise AssertionError(f"more than {LONGEST} steps")


def test_a_reader_that_opens_its_tables_late_sees_its_transaction(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    held = snapshot(log)
    held.files("images")
    put_images(log, {"a": 1, "b": 0})
    put_images(log, {"c": 0})
    opened = held.table("patches", SCHEMA)
    assert opened and opened.read(["image_id", "version"]).to_pylist() == [{"image_id": "a", "version": 0}]
    assert held.version("patches") == held.version("images")


# Races


def race(trials: Trials, log: TransactionLog, each: int) -> None:
    """Two processes, each with images of its own in every transaction, and one that both replace."""
    children = [
        trials.start("put", store=log.uri, options=log.options, images=[{f"{name}{at:02}": 0} for at in range(each)])
        for name in "pq"
    ]
    assert [trials.wait(child) for child in children] == [0, 0]
    holds(log, {f"{name}{at:02}": 0 for name in "pq" for at in range(each)})
    assert log.listing().newest == 2 * each


def test_two_processes_of_twenty_transactions_each(trials: Trials, log: TransactionLog) -> None:
    race(trials, log, 20)


@pytest.mark.slow
def test_races_of_four_with_kills(trials: Trials, tmp_path: Path) -> None:
    """Each is killed somewhere and started again until it is through."""
    for round_number in range(4):
        log = TransactionLog(str(tmp_path / str(round_number)))
        lists = {name: [{f"{name}{at}": 0} for at in range(5)] + [{"shared": 1}] for name in "pqrs"}
        codes = dict.fromkeys(lists, KILLED)
        for attempt in range(20):
            children = {
                name: trials.start("put", store=log.uri, images=lists[name], die_at=3 + 7 * attempt + ord(name) % 5)
                for name, code in codes.items()
                if code == KILLED
            }
            codes |= {name: trials.wait(child) for name, child in children.items()}
        assert set(codes.values()) == {0}
        put_images(log, {"z": 0})
        holds(log, {f"{name}{at}": 0 for name in lists for at in range(5)} | {"shared": 1, "z": 0})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once(trials: Trials, tmp_path: Path, seed: int) -> None:
    """Two that add and replace, one that compacts, one that sweeps whatever is unnamed; all of them killed now and then
    and started again, and the log cut behind them. What was done stays, and every image is there once."""
    chance = random.Random(seed)
    log = TransactionLog(str(tmp_path / "store"))
    old = {f"old{at}": 0 for at in range(4)}
    put_images(log, old)
    lists = {name: [{f"{name}{at}": 0} for at in range(6)] + [{f"old{at}": 1} for at in range(4)] for name in "pq"}
    work: list[tuple[str, dict[str, Any]]] = [("insist", {"images": images}) for images in lists.values()]
    work += [("compact", {"times": 5}), ("sweep", {"times": 5})]
    codes = [KILLED] * len(work)
    for _ in range(60):
        children = [
            trials.start(change, store=log.uri, die_at=chance.randrange(4, 120), **arguments)
            for (change, arguments), code in zip(work, codes, strict=True)
            if code == KILLED
        ]
        ended = [trials.wait(child) for child in children]
        codes = [ended.pop(0) if code == KILLED else code for code in codes]
        assert set(codes) <= {0, KILLED}
        seen_by_a_reader(log)
        aged(log, 8).cut()
        if set(codes) == {0}:
            break
    assert set(codes) == {0}
    put_images(log, {"z": 0})
    holds(log, {f"{name}{at}": 0 for name in lists for at in range(6)} | dict.fromkeys(old, 1) | {"z": 0})


# Lost answers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (transaction_log, publishing):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0)


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


# Retention, sleepers, garbage


def aged(log: TransactionLog, days: float) -> TransactionLog:
    """The same store as a process sees it whose clock is ahead."""
    return TransactionLog(log.uri, log.options, clock=lambda: time.time() + days * DAY)


def asleep_before_its_put(log: TransactionLog, meanwhile: Callable[[], None]) -> int | None:
    """A change that stands, everything decided, right before it writes its transaction."""
    original, slept = TransactionLog._put_once, list[int]()

    def put(one: TransactionLog, uri: str, data: bytes) -> bool:
        if one is log and not slept:
            slept.append(1)
            meanwhile()
        return original(one, uri, data)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransactionLog, "_put_once", put)
        number = put_images(log, {"late": 0})
    assert slept
    return number


def test_a_sleeper_does_not_believe_a_number_that_was_used_before(log: TransactionLog) -> None:
    def others() -> None:
        for image_id in "abc":
            put_images(fresh(log), {image_id: 0})
        assert aged(log, 8).cut() == [1]
        assert not Path(log.uri_of(1)).exists()

    assert asleep_before_its_put(log, others) == 4
    assert not Path(log.uri_of(1)).exists(), "it took back what it wrote under a number long past"
    holds(log, {"a": 0, "b": 0, "c": 0, "late": 0})


def test_a_sleeper_that_nobody_can_tell_about_says_so(log: TransactionLog) -> None:
    def others() -> None:
        for image_id in "abcd":
            put_images(fresh(log), {image_id: 0})
        assert aged(log, 8).cut() == [1, 2]

    with pytest.raises(JobError, match=r"slept for longer than the log .* is kept"):
        asleep_before_its_put(log, others)
    put_images(fresh(log), {"late": 0})  # the same command again; what the sleeper wrote has harmed nobody
    assert seen_by_a_reader(log) == {"a": 0, "b": 0, "c": 0, "d": 0, "late": 0}
    assert snapshot(log).number == 5


def test_what_a_dead_sleeper_wrote_under_an_old_number_is_not_taken_for_the_newest(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process lists the log and sleeps, others go on and cut it, another sleeper writes the number that the first
    one is about to read, and dies before it looks."""
    put_images(log, {"a": 0})
    leftover = write(log, "parts/x/images", {"x": 0})
    stale = json.loads(Path(log.uri_of(1)).read_bytes()) | {"token": "of a sleeper"}
    schema = DeltaTable(f"{log.uri}/images").schema().to_json()
    files = [{"path": leftover.path, "size": leftover.size, "rows": 1, "min": "x", "max": "x"}]
    entry = {"table": "parts/x/images", "schema": schema, "key": "image_id", "add": files, "remove": []}
    Path(log.uri_of(1, "published")).unlink()  # so that its reader would publish it
    original, slept = TransactionLog.read, list[int]()

    def read(one: TransactionLog, number: int) -> Any:
        if one is log and not slept:
            slept.append(number)
            for image_id in "bcd":
                put_images(fresh(log), {image_id: 0})
            assert aged(log, 8).cut() == [1, 2]
            Path(log.uri_of(1)).write_text(json.dumps(stale | {"tables": [entry | {"rearranges": False}]}))
        return original(one, number)

    monkeypatch.setattr(TransactionLog, "read", read)
    assert put_images(log, {"e": 0}) == 5
    assert slept == [1]
    assert seen_by_a_reader(log) == {image_id: 0 for image_id in "abcde"}
    assert snapshot(log).table("parts/x/images") is None


def test_a_reader_that_slept_is_not_told_what_a_dead_sleeper_wrote(
    log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(log, {"a": 0})
    stale = json.loads(Path(log.uri_of(1)).read_bytes())
    stale["pointers"] = {"index/photos": {"file": "index/photos/never.json", "checksum": None, "files": []}}
    original, slept = TransactionLog.read, list[int]()

    def read(one: TransactionLog, number: int) -> Any:
        if one is log and not slept:
            slept.append(number)
            for image_id in "bcd":
                put_images(fresh(log), {image_id: 0})
            assert aged(log, 8).cut() == [1, 2]
            Path(log.uri_of(1)).write_text(json.dumps(stale))
        return original(one, number)

    monkeypatch.setattr(TransactionLog, "read", read)
    current = snapshot(log)
    assert slept == [1] and (current.number, dict(current.pointers)) == (4, {})


def test_a_sleeper_after_its_put_finds_that_others_went_on(log: TransactionLog) -> None:
    original = TransactionLog.put

    def put(one: TransactionLog, transaction: Any) -> bool:
        landed = original(one, transaction)
        if one is log:
            put_images(fresh(log), {"a": 0})
            put_images(fresh(log), {"b": 0})
        return landed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransactionLog, "put", put)
        assert put_images(log, {"first": 0}) == 1
    holds(log, {"a": 0, "b": 0, "first": 0})


def test_the_log_is_cut_behind_the_retention_and_never_empty(log: TransactionLog) -> None:
    for image_id in "abcd":
        put_images(log, {image_id: 0})
    assert log.cut(0) == [], "files of the log stay for an hour in any case"
    assert aged(log, 8).cut(24 * 9) == []
    assert aged(log, 8).cut() == [1, 2]
    assert sorted(path.name[18:] for path in Path(log.folder).iterdir()) == [
        f"{number:02}.{kind}" for number in (3, 4) for kind in ("json", "published")
    ]
    assert aged(log, 80).cut() == []
    put_images(log, {"e": 0})
    holds(log, {image_id: 0 for image_id in "abcde"})


def test_a_transaction_that_is_not_published_keeps_the_one_before(log: TransactionLog, trials: Trials) -> None:
    for image_id in "abc":
        put_images(log, {image_id: 0})
    Path(log.uri_of(3, "published")).unlink()
    assert aged(log, 8).cut() == [], "1 was in force when the retention began, readers are at 2"
    assert snapshot(log).number == 2


def test_a_long_log_is_cut_by_the_way(log: TransactionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.store.transactions.CUT_EVERY", 5)
    late = aged(log, 8)
    for at in range(5):
        put_images(late, {str(at): 0})
    assert late.listing().numbers == [4, 5]


def test_garbage_is_what_nobody_names_once_it_is_old(log: TransactionLog) -> None:
    put_images(log, {"a": 0, "b": 0})
    put_images(log, {"c": 0})
    replaced = {f"{table}/{path}" for table in TABLES for path in snapshot(log).files(table)}
    compact(log)
    leftover = f"images/{write(log, 'images', {'x': 0}).path}"
    (Path(log.folder) / "00000000000000000009.json.abc.partial").write_text("a killed writer's")
    (Path(log.uri) / "images" / "notes.txt").write_text("not ours")
    partial = "transactions/00000000000000000009.json.abc.partial"
    staged = f"images/_delta_log/{9:020}.json#1"
    Path(log.uri, staged).write_text("a killed writer's")
    assert garbage(open_for_writing(log), 1) == []
    assert garbage(open_for_writing(log), 0.001) == [], "all of it is younger than four seconds"
    late = aged(log, 8)
    assert garbage(open_for_writing(late), 24 * 9) == []
    assert set(garbage(open_for_writing(late), 168)) == replaced | {leftover, partial, staged}
    sweep(late, 168)
    assert not any(Path(log.uri, path).exists() for path in replaced | {leftover, partial})
    assert (Path(log.uri) / "images" / "notes.txt").exists()
    holds(log, {"a": 0, "b": 0, "c": 0})


def test_readers_of_the_retention_keep_their_files(log: TransactionLog) -> None:
    """A file written long ago and replaced just now is being read."""
    put_images(log, {"a": 0})
    held = snapshot(log)
    for folder, _, names in os.walk(log.uri):
        for name in names:
            os.utime(os.path.join(folder, name), (time.time() - 10 * DAY,) * 2)
    put_images(log, {"a": 1})
    assert garbage(open_for_writing(log), 168) == []
    opened = held.table("images", SCHEMA)
    assert opened and opened.read(["version"]).to_pylist() == [{"version": 0}]


def test_what_pointers_stand_on_is_no_garbage(log: TransactionLog) -> None:
    folder = Path(log.uri, "index", "photos")
    folder.mkdir(parents=True)
    for name in ("manifest-1.json", "a.faiss", "manifest-2.json", "b.faiss", "killed.faiss", "notes.txt"):
        (folder / name).write_text(name)
    for at, segment in ((1, "a"), (2, "b")):
        pointer = Pointer(f"index/photos/manifest-{at}.json", None, (f"index/photos/{segment}.faiss",))
        transact(log, lambda _, to=pointer: Change(pointers={"index/photos": to}), run_id="r", command="index")  # type: ignore[misc]
    assert garbage(open_for_writing(aged(log, 8)), 168) == [
        f"index/photos/{name}" for name in ("a.faiss", "killed.faiss", "manifest-1.json")
    ]
    for name in ("manifest-2.json", "b.faiss", "killed.faiss"):
        os.utime(folder / name, (time.time() - 10 * DAY,) * 2)
    assert garbage(open_for_writing(log), 168) == [], "the log does not reach back that far"


def test_nothing_behind_a_link_is_swept(log: TransactionLog, tmp_path: Path) -> None:
    put_images(log, {"a": 0})
    outside = tmp_path / "outside"
    Table(str(outside), SCHEMA)
    (outside / "precious.parquet").write_text("somebody's")
    (Path(log.uri) / "parts").symlink_to(outside)
    assert garbage(open_for_writing(aged(log, 8)), 168) == []
    for path in ("parts/precious.parquet", "../outside/precious.parquet"):
        with pytest.raises(JobError, match=r"leads out of its folder|outside the store"):
            transact(log, lambda _, path=path: Change(sweep=[path]), run_id="r", command="compact")  # type: ignore[misc]
    assert (outside / "precious.parquet").exists()


# Stores of before, damage, storage


def store_of_before(log: TransactionLog) -> None:
    for table in TABLES:
        made = Table(f"{log.uri}/{table}", SCHEMA)
        made.commit([write(log, table, {"a": 0}), write(log, table, {"b": 0})], [], "old")


def test_a_store_of_before_is_read_and_brought_up_by_its_first_writer(log: TransactionLog) -> None:
    store_of_before(log)
    assert seen_by_a_reader(log) == {"a": 0, "b": 0} and snapshot(log).number == 0
    assert transact(log, lambda _: Change(), run_id="r", command="extract") == 1
    assert put_images(log, {"a": 1, "c": 0}) == 2
    holds(log, {"a": 1, "b": 0, "c": 0})
    assert set(Table(f"{log.uri}/images", SCHEMA).read(["version"])["version"].to_pylist()) == {0, 1}


def test_a_reader_of_a_store_of_before_while_its_first_transaction_is_on_its_way(log: TransactionLog) -> None:
    store_of_before(log)
    seen: list[Images] = []
    with at_step(0, lambda: None):
        original = DeltaTable.create_write_transaction

        def commit(delta: DeltaTable, *arguments: Any, **named: Any) -> None:
            seen.append(seen_by_a_reader(log))
            original(delta, *arguments, **named)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DeltaTable, "create_write_transaction", commit)
            put_images(log, {"a": 1})
    assert seen == [{"a": 0, "b": 0}] * 2
    holds(log, {"a": 1, "b": 0})


def test_compacting_leaves_the_version_of_the_content(log: TransactionLog) -> None:
    """Which indices and jobs of before go by; where older commits are gone behind a checkpoint too."""
    put_images(log, {"a": 0})
    put_images(log, {"b": 0})
    before = Table(f"{log.uri}/images", SCHEMA).content_version
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
    after = Table(f"{log.uri}/images", SCHEMA)
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


def test_a_power_cut_at_every_step(trials: Trials, tmp_path: Path) -> None:
    """What was said to be done is there, and the change that was on its way has happened or has not."""
    template = make_disk(tmp_path / "template")
    before, wanted = {"a": 0, "b": 0, "d": 0}, {"a": 1, "b": 0, "c": 0, "d": 0}
    with mounted_disk(template, tmp_path / "disk") as disk:
        with_old_images(TransactionLog(str(disk / "store")))
    for step in range(LONGEST):
        image = cut_power(template, tmp_path / "image")
        with mounted_disk(image, tmp_path / "disk") as disk:
            log = TransactionLog(str(disk / "store"))
            code = trials.run("put", store=log.uri, images=[{"a": 1, "c": 0}], die_at=step)
            found = cut_power(image, tmp_path / "found")
        with mounted_disk(found, tmp_path / "disk"):
            assert seen_by_a_reader(log) in ([wanted] if code == 0 else [before, wanted]), f"step {step}"
            put_images(fresh(log), {"a": 1, "c": 0})
            holds(log, wanted)
        if code == 0:
            return
    raise AssertionError(f"more than {LONGEST} steps")


def test_the_first_change_of_a_store_survives_a_power_cut(trials: Trials, tmp_path: Path) -> None:
    image = make_disk(tmp_path / "image")
    with mounted_disk(image, tmp_path / "disk") as disk:
        log = TransactionLog(str(disk / "new" / "store"))
        assert trials.run("put", store=log.uri, images=[{"a": 0}]) == 0
        found = cut_power(image, tmp_path / "found")
    with mounted_disk(found, tmp_path / "disk"):
        holds(log, {"a": 0})


def tear(path: Path) -> None:
    """Empty it, as of a moment before the machine started."""
    path.write_bytes(b"")
    os.utime(path, (time.time() - 60,) * 2)


def test_what_a_power_cut_left_of_a_commit_is_made_again(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    put_images(log, {"a": 1, "b": 0})
    Path(log.uri_of(2, "published")).unlink()  # it is written when everything is on the disk
    tear(Path(log.uri, "images", "_delta_log", f"{2:020}.json"))
    Path(log.uri, "patches", "_delta_log", f"{2:020}.json").unlink()
    assert put_images(fresh(log), {"a": 1}) is None
    holds(log, {"a": 1, "b": 0})
    assert all(os.path.getsize(path) for path in files_in(log) if "_delta_log" in path)


def test_what_a_power_cut_left_of_a_new_table_is_made_again(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    Path(log.uri_of(1, "published")).unlink()
    for version in (0, 1):
        tear(Path(log.uri, "images", "_delta_log", f"{version:020}.json"))
    assert put_images(fresh(log), {"b": 0}) == 2
    holds(log, {"a": 0, "b": 0})


def test_what_a_power_cut_left_of_a_checkpoint_goes(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    put_images(log, {"b": 0})
    Path(log.uri_of(2, "published")).unlink()
    DeltaTable(f"{log.uri}/images").create_checkpoint()
    (checkpoint,) = Path(log.uri, "images", "_delta_log").glob("*.parquet")
    tear(checkpoint)
    assert put_images(fresh(log), {"c": 0}) == 3
    holds(log, {"a": 0, "b": 0, "c": 0})


def test_what_counts_is_on_the_disk_before_the_next_step(log: TransactionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data before the transaction that names it, the transaction before any table, tables before the mark."""
    order: list[str] = []
    fsync, link, commit = os.fsync, os.link, DeltaTable.create_write_transaction

    def named(path: str) -> str:
        return os.path.relpath(path, log.uri).split(".json.")[0]

    def sync(descriptor: int) -> None:
        order.append(f"sync {named(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def put(source: str, target: str) -> None:
        link(source, target)
        order.append(f"put {named(target)}")

    def publish(delta: DeltaTable, *arguments: Any, **options: Any) -> None:
        commit(delta, *arguments, **options)
        order.append(f"commit {named(delta.table_uri.removeprefix('file://').rstrip('/'))}")

    def mark(one: TransactionLog, number: int) -> None:
        order.append("mark")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", put)
    monkeypatch.setattr(DeltaTable, "create_write_transaction", publish)
    monkeypatch.setattr(TransactionLog, "mark_published", mark)
    put_images(log, {"a": 0})
    at = {what: order.index(what) for what in order}
    last = {what: len(order) - 1 - order[::-1].index(what) for what in order}
    written = at[f"put transactions/{1:020}.json"]
    for table in TABLES:
        (file,) = snapshot_files(log, table)
        for synced in (f"sync {table}/{file}", f"sync {table}", "sync .", f"sync transactions/{1:020}"):
            assert at[synced] < written, synced
        assert written < last["sync transactions"] < at[f"commit {table}"]
        for synced in (f"sync {table}/_delta_log/{0:020}.json", f"sync {table}/_delta_log/{1:020}.json"):
            assert at[f"commit {table}"] < at[synced] < at["mark"]
        assert at[f"commit {table}"] < last[f"sync {table}/_delta_log"] < at["mark"]
        assert at[f"commit {table}"] < last[f"sync {table}"] < at["mark"]


def snapshot_files(log: TransactionLog, table: str) -> list[str]:
    return [Path(path).name for path in DeltaTable(f"{log.uri}/{table}").file_uris()]


def test_damaged_and_newer_logs_are_one_sentence(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    path = Path(log.uri_of(1))
    sound = json.loads(path.read_bytes())
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
        with pytest.raises(JobError, match=r"images does not have transaction 2, .*restore it whole"):
            use()


def test_a_damaged_table_is_one_sentence(log: TransactionLog) -> None:
    put_images(log, {"a": 0})
    Path(log.uri, "images", "_delta_log", f"{1:020}.json").write_bytes(b"\0" * 400)
    for use in (lambda: snapshot(log).files("images"), lambda: put_images(log, {"b": 0})):
        with pytest.raises(JobError, match=r"The log of .*/images is damaged .*repair"):
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


# The same on S3


@pytest.fixture
def bucket_log(s3: S3Server) -> TransactionLog:
    return TransactionLog(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3.options)


def test_a_bucket_has_put_if_absent_and_lost_answers_are_told(
    bucket_log: TransactionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(bucket_log, {"a": 0, "b": 0})
    monkeypatch.setattr(transaction_log, "FIRST_PAUSE_SECONDS", 0)
    original, lost = conditional.put_if_absent, list[str]()

    def put(uri: str, data: bytes, options: Any = None) -> bool:
        landed = original(uri, data, options)
        if not lost:
            lost.append(uri)
            raise TimeoutError("the storage did not answer")
        return landed

    monkeypatch.setattr(transaction_log, "put_if_absent", put)
    assert put_images(bucket_log, {"a": 1}) == 2
    holds(bucket_log, {"a": 1, "b": 0})
    assert lost and bucket_log.messages == []
    with pytest.raises(JobError, match="is gone"):
        file = write(bucket_log, "images", {"x": 0})
        fs, path = transaction_log.filesystem(f"{bucket_log.uri}/images/{file.path}", bucket_log.options)
        fs.rm_file(path)
        change = Change([TableChange("images", SCHEMA, [file])])
        transact(bucket_log, lambda _: change, run_id="r", command="c")


def test_killed_at_every_step_in_a_bucket(trials: Trials, s3: S3Server) -> None:
    def new_store() -> TransactionLog:
        return with_old_images(TransactionLog(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3.options))

    assert kill_everywhere(trials, new_store, "new, replaced and copied rows") >= 8


def test_two_processes_race_in_a_bucket(trials: Trials, bucket_log: TransactionLog) -> None:
    race(trials, bucket_log, 6)


def test_garbage_and_cuts_in_a_bucket(bucket_log: TransactionLog) -> None:
    put_images(bucket_log, {"a": 0})
    put_images(bucket_log, {"b": 0})
    compact(bucket_log)
    late = aged(bucket_log, 8)
    assert len(sweep(late, 168)) == 4
    assert late.cut() == [1, 2]
    put_images(bucket_log, {"c": 0})
    holds(bucket_log, {"a": 0, "b": 0, "c": 0})
