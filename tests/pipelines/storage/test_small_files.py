"""Small files are whole or absent, and of several writers one is first."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from pipelines import storage

WRITERS = 6
ROUNDS = 100
# Of a file: more than one write of the system takes, so that one in pieces would show.
COPIES = 20_000


def test_writers_with_the_same_process_id_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Threads have it, and so do programs in containers that share a folder: there each has the process id 1."""
    barrier, often = Barrier(WRITERS), tmp_path / "often"
    whole = [b"%d" % number * COPIES for number in range(WRITERS)]

    def write(number: int) -> list[bool]:
        first = []
        for at in range(ROUNDS):
            barrier.wait(60)
            storage.write_bytes(str(often), b"%d" % number * COPIES)
            assert often.read_bytes() in whole
            first.append(storage.write_once(str(tmp_path / f"once-{at}"), b"%d" % number))
        return first

    with ThreadPoolExecutor(WRITERS) as pool:
        rounds = list(zip(*pool.map(write, range(WRITERS)), strict=True))

    assert [sum(first) for first in rounds] == [1] * ROUNDS
    for at, first in enumerate(rounds):
        assert (tmp_path / f"once-{at}").read_bytes() == b"%d" % first.index(True)
    assert not list(tmp_path.glob("*.partial"))
