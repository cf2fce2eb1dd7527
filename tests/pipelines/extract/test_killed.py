"""Drivers and workers killed in mid-run, and runs that compete: nothing lost, nothing twice.

test_soak.py does the same at random moments, again and again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from disturbed_runs import Place, commits, finish, judge, make_photos, started, wait_for, workers

IMAGES = 48


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photos, and the store of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source, store = make_photos(folder / "in", IMAGES), folder / "store"
    finish(Place(str(source), str(store)))
    assert commits(store, "images") > 3, "a run of one commit could not be killed half-way"
    return source, store


# tests/pipelines/store/test_commands_disturbed.py kills at every step of a commit, in seconds
def test_a_driver_killed_at_several_moments_loses_and_repeats_nothing(
    undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, expected = undisturbed
    store = tmp_path / "store"
    moments: list[Callable[[], bool]] = [
        lambda: (store / "store.json").exists(),
        lambda: commits(store, "images") >= 4,
    ]
    for happened in moments:
        with started(Place(str(source), str(store))) as process:
            wait_for(happened, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
    finish(Place(str(source), str(store)))
    judge(store, expected)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_images_are_done(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    source, expected = undisturbed
    store = tmp_path / "store"
    with started(Place(str(source), str(store))) as process:
        wait_for(lambda: commits(store, "images") >= 1, process)
        victims = workers(process.pid)
        assert victims
        victims[0].kill()  # as the kernel does when memory runs out
        assert process.wait(timeout=300) == 0
    judge(store, expected)


@pytest.mark.slow  # test_commit.py has two runs that compete, in seconds
@pytest.mark.parametrize("count", [2, 4])
def test_runs_at_the_same_time_do_every_image_once(undisturbed: tuple[Path, Path], tmp_path: Path, count: int) -> None:
    source, expected = undisturbed
    store = tmp_path / "store"
    with ExitStack() as stack:
        runs = [stack.enter_context(started(Place(str(source), str(store)))) for _ in range(count)]
        assert [one.wait(timeout=500) for one in runs] == [0] * count
    judge(store, expected)
    assert len(list((store / "runs").glob("*.json"))) == count
