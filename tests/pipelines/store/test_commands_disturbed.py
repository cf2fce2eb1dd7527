"""Extract, prune and compact on real stores: killed at every step, whatever command comes next, and paused at every
step while another command runs whole."""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from pathlib import Path

import pytest
from small_runs import settings
from store_changes import COMMANDS, after, compact, compact_and_sweep, contents, extract_written, new_store, opened
from trials import KILLED, Trials, at_step

from pipelines.errors import JobError
from pipelines.upkeep import verify

LONGEST = 300  # steps of one command


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
    trials: Trials, template: Path, tmp_path: Path, killed: str, then: str
) -> None:
    """The change has happened or has not, the other command makes its own, and then the first one runs again."""
    for step in itertools.count():
        store = str(shutil.copytree(template, tmp_path / "store"))
        code = trials.run("command", command=killed, store=store, die_at=step)
        assert code in (0, KILLED), f"step {step}"
        verified = verify.run(settings(), store=store)
        assert verified.problems == [], f"step {step}"
        COMMANDS[then](store)
        assert contents(store) in (after(then), after(then, killed)), f"step {step}"
        COMMANDS[killed](store)
        assert contents(store) == after(then, killed), f"step {step}"
        shutil.rmtree(store)
        if code == 0:
            assert step > 5
            return
        assert step < LONGEST


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
    for step in range(LONGEST):
        store = str(shutil.copytree(template, tmp_path / "store"))
        with at_step(step, partial(COMMANDS[meanwhile], store), reads=True) as taken:
            COMMANDS[paused](store)
        if len(taken) > step:
            assert contents(store) == after(paused, meanwhile), f"step {step}: {taken[step]}"
            compact_and_sweep(store)  # whatever is left over
            assert contents(store) == after(paused, meanwhile), f"step {step}"
        shutil.rmtree(store)
        if len(taken) <= step:
            assert step > 15
            return
    raise AssertionError(f"more than {LONGEST} steps")


@pytest.mark.slow
@pytest.mark.parametrize("paused", ["extract", "prune"])
def test_paused_while_another_sweeps_without_retention(template: Path, tmp_path: Path, paused: str) -> None:
    """What workers have written and the driver has not named may be swept, and what is read replaced and swept at once:
    the command is whole, or fails with a sentence and changes nothing."""
    failed = 0
    for step in range(LONGEST):
        store = str(shutil.copytree(template, tmp_path / "store"))
        commit = extract_written(opened(store)) if paused == "extract" else partial(COMMANDS[paused], store)
        with at_step(step, partial(compact_and_sweep, store), reads=True) as taken:
            try:
                commit()
            except JobError as error:
                assert "run the same command again" in str(error).lower()
                failed += 1
                assert contents(store) == after()
                COMMANDS[paused](store)
        assert contents(store) == after(paused), f"step {step}"
        shutil.rmtree(store)
        if len(taken) <= step:
            assert failed or paused == "prune"
            return
    raise AssertionError(f"more than {LONGEST} steps")


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
