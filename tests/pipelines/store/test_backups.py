"""A store that is copied while it is written to, in the order of docs/operations.md, is a store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from backups import Backup
from simulated_jobs import JOBS, Place
from storage_steps import at_step
from store_contents import Contents, contents_of, differences
from stores import sound

from pipelines.errors import JobError
from pipelines.upkeep import verify

LONGEST = 100  # steps of a job

pytestmark = pytest.mark.usefixtures("in_process")


def contents(folder: str | Path, place: Place) -> Contents:
    return contents_of(str(folder), place.config())


def disturbed(
    template: Place, folder: Path, job: str, parts: dict[int, Callable[[Backup], object]]
) -> tuple[Backup, int]:
    """A backup of which parts were made before some steps of a job, and how many steps the job has."""
    shutil.rmtree(folder, ignore_errors=True)
    place = Place(str(shutil.copytree(template.store, folder / "store")), template.inputs)
    backup = Backup(Path(place.store), folder / "copy")
    steps = [at_step(number, partial(part, backup)) for number, part in parts.items()]
    taken: list[str] = []
    for step in steps:
        taken = step.__enter__()
    try:
        JOBS[job](place)
    finally:
        for step in reversed(steps):
            step.__exit__(None, None, None)
    return backup, len(taken)


def restored(backup: Backup) -> Path:
    """What a restored copy is: a copy of the copy, whole."""
    return Path(shutil.copytree(backup.copy, backup.copy.with_name("restored")))


def logs_and_rest(backup: Backup) -> None:
    backup.copy_logs()
    while backup.is_behind():
        backup.copy_transactions()
        backup.copy_logs()
    backup.copy_rest()


@pytest.mark.parametrize("job", ["extract changed", pytest.param("prune", marks=pytest.mark.slow)])
def test_a_copy_made_at_every_step_of_a_commit(template: Place, tmp_path: Path, job: str) -> None:
    """It holds what was there before the commit or after it, and is gone on with."""
    before = contents(template.store, template)
    for step in range(LONGEST):
        backup, steps = disturbed(template, tmp_path / "trial", job, {step: Backup.make})
        if step >= steps:
            assert step > 10
            return
        copy, after = restored(backup), contents(backup.store, template)
        assert sound(copy).images
        assert not all(differences(contents(copy, template), one) for one in (before, after)), f"step {step}"
        JOBS[job](Place(str(copy), template.inputs))
        assert sound(copy).unreferenced_files < 20
        assert differences(contents(copy, template), after) == [], f"step {step}"
    raise AssertionError("the job has no end")


@pytest.mark.parametrize("gap", [9, *(pytest.param(gap, marks=pytest.mark.slow) for gap in (1, 4))])
def test_a_job_goes_on_between_the_steps_of_copying(template: Place, tmp_path: Path, gap: int) -> None:
    """Transactions are copied before one step, the tables' logs and the rest before a later one."""
    before = contents(template.store, template)
    for step in range(LONGEST):
        parts = {step: Backup.copy_transactions, step + gap: logs_and_rest}
        backup, steps = disturbed(template, tmp_path / "trial", "extract changed", parts)
        if step + gap >= steps:
            return
        copy, after = restored(backup), contents(backup.store, template)
        assert sound(copy).images
        assert not all(differences(contents(copy, template), one) for one in (before, after)), f"step {step}"
        JOBS["extract changed"](Place(str(copy), template.inputs))
        assert sound(copy) and differences(contents(copy, template), after) == [], f"step {step}"
    raise AssertionError("the job has no end")


def test_tables_copied_before_the_transactions_are_refused(template: Place, tmp_path: Path) -> None:
    """They lack what the transactions say that they have."""
    refused = 0
    for step in range(LONGEST):
        parts = {step: Backup.copy_logs, step + 6: lambda backup: (backup.copy_transactions(), backup.copy_rest())}
        backup, steps = disturbed(template, tmp_path / "trial", "extract changed", parts)
        if step + 6 >= steps:
            assert refused
            return
        if problems := verify.run(template.config(), store=str(backup.copy)).problems:
            assert any("the store was copied while it was written to" in problem for problem in problems), problems
            with pytest.raises(JobError, match=r"copied while it was written to[.] .*dinoray repair"):
                JOBS["extract changed"](Place(str(backup.copy), template.inputs))
            refused += 1
