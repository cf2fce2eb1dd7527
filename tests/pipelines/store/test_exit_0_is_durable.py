"""The power is cut as soon as a command has ended with 0, fifty times: what it said to be done is there.

A file system in a loop device is copied while it is mounted: the copy has what the device was given, and nothing that
the system only remembers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from killable_processes import KillableProcesses
from power_cuts import cut_power, make_disk, mounted_disk
from simulated_jobs import Place, make_inputs
from store_contents import contents_of, differences, twice

from pipelines.upkeep import verify

MEGABYTES = 64
# Each does something in the store that those before it have left.
COMMANDS = (
    *("extract first", "index update", "cluster", "cosegment", "correspond", "extract second", "compact"),
    *("cluster --update", "cosegment", "index update", "correspond", "extract third", "cluster --update", "compact"),
    *("extract changed", "index update", "cosegment", "correspond", "cluster", "extract new", "cluster --update"),
    *("prune", "index update", "correspond", "compact"),
)
ROUNDS = 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_power_cuts_right_after_exit_0(processes: KillableProcesses, tmp_path: Path) -> None:
    assert ROUNDS * len(COMMANDS) == 50
    processes.prepare_jobs()
    inputs = str(make_inputs(tmp_path / "inputs"))
    for number in range(ROUNDS):
        image = make_disk(tmp_path / f"image{number}", MEGABYTES)
        with mounted_disk(image, tmp_path / "disk") as disk:
            place = Place(str(disk / "new" / "store"), inputs)
            for command in COMMANDS:
                assert processes.run("job", job=command, store=place.store, inputs=inputs) == 0, command
                found = cut_power(image, tmp_path / "found")
                with mounted_disk(found, tmp_path / "after") as after:
                    _is_there(place, Place(str(after / "new" / "store"), inputs), command)


def _is_there(before: Place, after: Place, command: str) -> None:
    """The store opens, is sound, and says what it said before the power was cut."""
    assert verify.run(after.config(), store=after.store, deep=True).problems == [], command
    contents = contents_of(after.store, after.config())
    assert twice(contents) == []
    assert differences(contents, contents_of(before.store, before.config())) == [], command
