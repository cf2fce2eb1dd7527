"""Drivers and workers killed in mid-run, and runs that compete: nothing lost, nothing twice.

`make soak` repeats the random kills DINORAY_SOAK_ROUNDS times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from small_runs import as_options
from stores import assert_same, sound

# many small shards and commits, so that there is always something half done
OPTIONS = (
    *("run.workers=2", "run.images_per_shard=3", "run.commit_seconds=0.2", "image.shorter_side=96"),
    "run.max_failed_fraction=1",  # the broken photo may be among the last few that a continued run has left
)
IMAGES = 48
SOAK_ROUNDS = int(os.environ.get("DINORAY_SOAK_ROUNDS", "3"))


def command(source: Path, store: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("dinoray")), "extract", str(source), str(store), *as_options(*OPTIONS)]


def finish(source: Path, store: Path) -> None:
    done = subprocess.run(command(source, store), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@contextmanager
def started(source: Path, store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running extract in a process group of its own; whatever is left of it is killed in the end."""
    process = subprocess.Popen(
        command(source, store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        for left in [process.pid, *(child.pid for child in _children(process.pid))]:
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.wait()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def commits(store: Path, table: str) -> int:
    """Versions in a table's log, beyond its creation."""
    return max(0, len(list((store / table / "_delta_log").glob("*.json"))) - 1)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until it happened, looking as often as possible; fails when the run ends before."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photos, and the store of a run that nobody disturbed."""
    from small_runs import photo

    folder = tmp_path_factory.mktemp("undisturbed")
    for index in range(IMAGES):
        target = folder / "in" / f"{index:03d}.jpg"
        target.parent.mkdir(exist_ok=True)
        photo(index, *((96, 72) if index % 3 else (72, 96))).save(target)
    (folder / "in" / "broken.jpg").write_bytes(b"no image")
    finish(folder / "in", folder / "store")
    assert commits(folder / "store", "images") > 3, "a run of one commit could not be killed half-way"
    return folder / "in", folder / "store"


def test_a_driver_killed_at_several_moments_loses_and_repeats_nothing(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, expected = undisturbed
    store = tmp_path / "store"
    moments: list[Callable[[], bool]] = [
        lambda: (store / "store.json").exists(),
        lambda: commits(store, "patches") > commits(store, "images"),  # between the two commits of a shard
        lambda: commits(store, "images") >= 4,
    ]
    for happened in moments:
        with started(source, store) as process:
            wait_for(happened, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
    finish(source, store)
    assert_same(store, expected)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_images_are_done(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    store = tmp_path / "store"
    with started(source, store) as process:
        wait_for(lambda: commits(store, "images") >= 1, process)
        victims = [child for child in _children(process.pid) if "FusedWorker" in " ".join(child.cmdline())]
        assert victims, [child.cmdline()[:1] for child in _children(process.pid)]
        victims[0].kill()
        assert process.wait(timeout=300) == 0
    assert_same(store, expected)


@pytest.mark.slow  # test_commit.py has two runs that compete, in seconds
def test_two_runs_at_the_same_time_do_every_image_once(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    store = tmp_path / "store"
    with started(source, store) as one, started(source, store) as other:
        assert (one.wait(timeout=400), other.wait(timeout=400)) == (0, 0)
    assert_same(store, expected)
    assert len(list((store / "runs").glob("*.json"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(60 * (SOAK_ROUNDS + 5))
def test_drivers_killed_at_random_moments(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    store, generator = tmp_path / "store", random.Random(0)
    kills = 0
    for round_number in range(SOAK_ROUNDS):
        if (store / "images").exists() and sound_rows(store) == IMAGES:
            assert_same(store, expected)
            store = tmp_path / f"store{round_number}"
        with started(source, store) as process:
            try:
                process.wait(timeout=generator.uniform(3, 16))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                kills += 1
    finish(source, store)
    assert_same(store, expected)
    print(f"{kills} kills in {SOAK_ROUNDS} runs, no row lost, none twice")


def sound_rows(store: Path) -> int:
    from deltalake import DeltaTable

    rows = DeltaTable(store / "images").to_pyarrow_table(columns=["image_id"]).num_rows
    return sound(store).images if rows == IMAGES else rows
