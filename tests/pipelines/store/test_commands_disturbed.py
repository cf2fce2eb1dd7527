"""Extract, prune and compact on real stores: killed at every step, whatever command comes next, and paused at every
step while another command runs whole."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from every_step import each_step
from killable_processes import KillableProcesses
from small_runs import settings
from store_commands import COMMANDS, after, compact, compact_and_sweep, contents, extract_written, new_store, opened

from pipelines.errors import JobError
from pipelines.upkeep import verify


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "store"
    new_store(folder)
    return folder


@pytest.mark.parametrize(
    ("killed", "then"),
    [
        ("extract", "compact_and_sweep"),
        ("prune", "extract"),
        pytest.param("compact", "extract", marks=pytest.mark.slow),
        pytest.param("compact_and_sweep", "compact_and_sweep", marks=pytest.mark.slow),
        pytest.param("extract", "prune", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_step_before_another_command(
    processes: KillableProcesses, template: Path, tmp_path: Path, killed: str, then: str
) -> None:
    """The change has happened or has not, the other command makes its own, and then the first one runs again."""
    for step in each_step():
        store = str(shutil.copytree(template, tmp_path / "store"))
        step.ended(processes.run("command", command=killed, store=store, die_at=step.number))
        verified = verify.run(settings(), store=store)
        assert verified.problems == [], f"{step}"
        COMMANDS[then](store)
        assert contents(store) in (after(then), after(then, killed)), f"{step}"
        COMMANDS[killed](store)
        assert contents(store) == after(then, killed), f"{step}"
        shutil.rmtree(store)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("paused", "meanwhile"),
    [
        ("compact", "extract"),
        ("extract", "compact"),
        pytest.param("compact", "prune", marks=pytest.mark.slow),
        pytest.param("prune", "compact", marks=pytest.mark.slow),
        pytest.param("compact", "compact", marks=pytest.mark.slow),
        pytest.param("prune", "extract", marks=pytest.mark.slow),
        pytest.param("extract", "prune", marks=pytest.mark.slow),
        pytest.param("extract", "extract", marks=pytest.mark.slow),
    ],
)
def test_paused_at_every_step_while_another_command_runs(
    template: Path, tmp_path: Path, paused: str, meanwhile: str
) -> None:
    for step in each_step(15):
        store = str(shutil.copytree(template, tmp_path / "store"))
        with step.disturbed(partial(COMMANDS[meanwhile], store), reads=True):
            COMMANDS[paused](store)
        if not step.is_past:
            assert contents(store) == after(paused, meanwhile), f"{step}"
            compact_and_sweep(store)  # whatever is left over
            assert contents(store) == after(paused, meanwhile), f"{step}"
        shutil.rmtree(store)


@pytest.mark.slow
@pytest.mark.parametrize("paused", ["extract", "prune"])
def test_paused_while_another_sweeps_without_retention(template: Path, tmp_path: Path, paused: str) -> None:
    """What workers have written and the driver has not named may be swept, and what is read replaced and swept at once:
    the command is whole, or fails with a sentence and changes nothing."""
    failed = 0
    for step in each_step(15):
        store = str(shutil.copytree(template, tmp_path / "store"))
        commit = extract_written(opened(store)) if paused == "extract" else partial(COMMANDS[paused], store)
        with step.disturbed(partial(compact_and_sweep, store), reads=True):
            try:
                commit()
            except JobError as error:
                assert "run the same command again" in str(error).lower()
                failed += 1
                assert contents(store) == after()
                COMMANDS[paused](store)
        assert contents(store) == after(paused), f"{step}"
        shutil.rmtree(store)
    assert failed or paused == "prune"


def test_nothing_is_left_over_for_good(template: Path, tmp_path: Path) -> None:
    """Files that a killed command wrote are gone after the retention."""
    store = shutil.copytree(template, tmp_path / "store")
    leftover = shutil.copy(
        next((store / "patches").glob("*.parquet")), store / "patches" / "part-x-000000000000.parquet"
    )
    compact(str(store))
    assert Path(leftover).exists()
    compact_and_sweep(str(store))
    assert not Path(leftover).exists()
    assert len(list((store / "patches").glob("*.parquet"))) == 1
    assert contents(str(store)) == after()
