"""Changes killed at every step, paused at every step while others run whole, and in races."""

from __future__ import annotations

import random
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from every_step import each_step
from killable_processes import KILLED, KillableProcesses
from kills_pauses_and_races import CHANGES, LEAST_STEPS_AND_READS, kill_everywhere, pause_everywhere, race
from two_table_store import (
    SCHEMA,
    Images,
    aged,
    compact,
    drop_images,
    holds,
    put_images,
    seen_by_a_reader,
    sweep,
    with_old_images,
)

from pipelines.errors import JobError
from pipelines.store.snapshots import snapshot
from pipelines.store.transaction_log import TransactionLog

# Killed at every step


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("compact", "sweep") else ()) for name in CHANGES]
)
def test_killed_at_every_step(processes: KillableProcesses, tmp_path: Path, name: str) -> None:
    template = TransactionLog(str(tmp_path / "template"))
    if name != "the first change of a new store":
        with_old_images(template)

    def new_store() -> TransactionLog:
        log = TransactionLog(str(tmp_path / uuid.uuid4().hex))
        if Path(template.uri).exists():
            shutil.copytree(template.uri, log.uri)
        return log

    kill_everywhere(processes, new_store, name, least=5 if name == "sweep" else 10)


# Paused at every step


def test_paused_at_every_step_while_another_adds(tmp_path: Path) -> None:
    paused = pause_everywhere(
        tmp_path, {"a": 0}, lambda log: put_images(log, {"b": 0}), lambda log: put_images(log, {"c": 0})
    )
    for log in paused:
        holds(log, {"a": 0, "b": 0, "c": 0})


def test_paused_at_every_step_while_another_makes_the_same(tmp_path: Path) -> None:
    """Two commands over the same images, one of them changed: who comes second drops what is done elsewhere."""
    paused = pause_everywhere(
        tmp_path, {"a": 0}, lambda log: put_images(log, {"a": 1, "b": 0}), lambda log: put_images(log, {"a": 1, "c": 0})
    )
    for log in paused:
        holds(log, {"a": 1, "b": 0, "c": 0})


def test_compact_paused_at_every_step_gives_way(tmp_path: Path) -> None:
    """To one that replaces an image whose file is being merged: old rows do not come back."""
    outcomes = set()

    def merge(log: TransactionLog) -> None:
        outcomes.add(compact(log) is not None)

    for log in pause_everywhere(tmp_path, {"a": 0, "b": 0}, merge, lambda log: put_images(log, {"a": 1})):
        holds(log, {"a": 1, "b": 0})
    assert outcomes == {True, False}, "compact came first at some steps and gave way at others"


def test_a_replacement_paused_at_every_step_of_it_while_compact_runs(tmp_path: Path) -> None:
    """What it had rewritten is merged under it: it looks again and rewrites the merged file."""
    paused = pause_everywhere(tmp_path, {"a": 0, "b": 0}, lambda log: put_images(log, {"a": 1}), compact)
    for log in paused:
        holds(log, {"a": 1, "b": 0})


def test_prune_paused_at_every_step_while_another_adds(tmp_path: Path) -> None:
    paused = pause_everywhere(
        tmp_path, {"a": 0, "b": 0}, lambda log: drop_images(log, ["a"]), lambda log: put_images(log, {"c": 0})
    )
    for log in paused:
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

    for log in pause_everywhere(tmp_path, {"a": 0}, change, lambda log: sweep(log)):
        holds(log, {"a": 0, "b": 0})
    assert failed, "some step lies between the writing of a file and its naming"


def look(log: TransactionLog, seen: list[Images]) -> None:
    seen.append(seen_by_a_reader(log))


def test_a_reader_at_every_step_sees_one_transaction(tmp_path: Path) -> None:
    """Between two publishes too: what it sees is before, up to some step, and after from there on."""
    before, after = {"a": 0, "b": 0}, {"a": 1, "b": 0, "c": 0}
    seen: list[Images] = []
    for step in each_step(LEAST_STEPS_AND_READS):
        log = TransactionLog(str(tmp_path / uuid.uuid4().hex))
        put_images(log, before)
        with step.disturbed(partial(look, log, seen), reads=True):
            put_images(log, {"a": 1, "c": 0})
        look(log, seen)
        if not step.is_past:
            assert seen.pop() == after
    first_after = seen.index(after)
    assert seen == [before] * first_after + [after] * (len(seen) - first_after)


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


def test_two_processes_of_twenty_transactions_each(processes: KillableProcesses, tmp_path: Path) -> None:
    race(processes, str(tmp_path), {}, 20)


@pytest.mark.slow
def test_races_of_four_with_kills(processes: KillableProcesses, tmp_path: Path) -> None:
    """Each is killed somewhere and started again until it is through."""
    for round_number in range(4):
        log = TransactionLog(str(tmp_path / str(round_number)))
        lists = {name: [{f"{name}{at}": 0} for at in range(5)] + [{"shared": 1}] for name in "pqrs"}
        codes = dict.fromkeys(lists, KILLED)
        for attempt in range(20):
            children = {
                name: processes.start("put", store=log.uri, images=lists[name], die_at=3 + 7 * attempt + ord(name) % 5)
                for name, code in codes.items()
                if code == KILLED
            }
            codes |= {name: processes.wait(child) for name, child in children.items()}
        assert set(codes.values()) == {0}
        put_images(log, {"z": 0})
        holds(log, {f"{name}{at}": 0 for name in lists for at in range(5)} | {"shared": 1, "z": 0})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once(processes: KillableProcesses, tmp_path: Path, seed: int) -> None:
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
            processes.start(change, store=log.uri, die_at=chance.randrange(4, 120), **arguments)
            for (change, arguments), code in zip(work, codes, strict=True)
            if code == KILLED
        ]
        ended = [processes.wait(child) for child in children]
        codes = [ended.pop(0) if code == KILLED else code for code in codes]
        assert set(codes) <= {0, KILLED}
        seen_by_a_reader(log)
        aged(log, 8).cut()
        if set(codes) == {0}:
            break
    assert set(codes) == {0}
    put_images(log, {"z": 0})
    holds(log, {f"{name}{at}": 0 for name in lists for at in range(6)} | dict.fromkeys(old, 1) | {"z": 0})
