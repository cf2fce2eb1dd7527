"""Changes that are killed, paused, or raced by others, and the stores that they leave."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from every_step import each_step
from killable_processes import KillableProcesses
from two_table_store import (
    TABLES,
    Images,
    compact,
    fresh,
    holds,
    in_other_words,
    put_images,
    seen_by_a_reader,
    sweep,
    write,
)

from pipelines.storage.filesystems import Options
from pipelines.store import transaction_log
from pipelines.store.transaction_log import TransactionLog

# Steps of one change, reading ones included: one that does nothing takes fewer.
LEAST_STEPS_AND_READS = 12
RACES_TRIED = 5
# One after the other, they change it once.
LEAD_CHANGES_OF_A_RACE = 3

CHANGES: dict[str, tuple[str, dict[str, Any], Images]] = {
    "the first change of a new store": ("put", {"images": [{"c": 0}]}, {"c": 0}),
    "new, replaced and copied rows": ("put", {"images": [{"a": 1, "c": 0}]}, {"a": 1, "b": 0, "c": 0, "d": 0}),
    "compact": ("compact", {}, {"a": 0, "b": 0, "d": 0}),
    "sweep": ("sweep", {}, {"a": 0, "b": 0, "d": 0}),
}


def kill_everywhere(
    processes: KillableProcesses, new_store: Callable[[], TransactionLog], name: str, least: int
) -> None:
    """Kill a change at each of its steps, of which there are at least some, each time in a store of its own."""
    change, arguments, wanted = CHANGES[name]
    for step in each_step(least):
        log = new_store()
        before = seen_by_a_reader(log)
        if name == "sweep":
            leftovers = [write(log, table, {"x": 9}).path for table in TABLES]
        step.ended(processes.run(change, store=log.uri, options=log.options, die_at=step.number, **arguments))
        found = seen_by_a_reader(log)
        assert found in (before, wanted), f"{step}: a reader sees {found}"
        put_images(fresh(log), {"z": 0})  # another process opens the store, finishes, and does something of its own
        assert seen_by_a_reader(log) in (before | {"z": 0}, wanted | {"z": 0}), f"{step}"
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


def pause_everywhere(
    tmp_path: Path, start: Images, change: Callable[[TransactionLog], Any], other: Callable[[TransactionLog], Any]
) -> Iterator[TransactionLog]:
    """Stores in which `other` ran whole while `change` stood at one of its steps, reading ones too."""
    for step in each_step(LEAST_STEPS_AND_READS):
        log = TransactionLog(str(tmp_path / uuid.uuid4().hex))
        in_other_words(log, start)
        with step.disturbed(partial(other, fresh(log)), reads=True):
            change(fresh(log))
        if not step.is_past:
            yield log


def race(processes: KillableProcesses, uri: str, options: Options, each: int) -> None:
    """Two processes make transactions in one store below `uri`, each with an image of its own. They must have been at
    it at the same time; where one was through before the other began, it is tried again with another store."""
    for _ in range(RACES_TRIED):
        log = TransactionLog(f"{uri}/{uuid.uuid4().hex}", options)
        children = [
            processes.start("put", store=log.uri, options=options, images=[{f"{name}{at:02}": 0} for at in range(each)])
            for name in "pq"
        ]
        assert [processes.wait(child) for child in children] == [0, 0]
        holds(log, {f"{name}{at:02}": 0 for name in "pq" for at in range(each)})
        assert log.listing().newest == 2 * each
        if _times_the_lead_changed(log) >= LEAD_CHANGES_OF_A_RACE:
            return
    raise AssertionError(f"in {RACES_TRIED} races the processes took no turns")


def _times_the_lead_changed(log: TransactionLog) -> int:
    """How often a transaction is of another process than the one before."""
    made = [log.read(number) for number in log.listing().numbers]
    makers = [one.tables[0].add[0].min_id[0] for one in made if one]
    return sum(one != other for one, other in itertools.pairwise(makers))
