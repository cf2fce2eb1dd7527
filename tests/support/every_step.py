"""A run that is disturbed before each of its steps on the way to storage in turn, from the first to the last."""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from killable_processes import KILLED
from storage_steps import at_step

LEAST_STEPS = 6  # of a run that does anything worth disturbing
MOST_STEPS = 300  # of a run that ends


class Killed(BaseException):
    """What ends a run at one of its steps, as a kill does."""


def die(store: str) -> None:
    """To be had before a step."""
    raise Killed


class Step:
    """One step of a run, which is begun again for each of them. is_past: the run ended before it came to this step, so
    that nothing disturbed it. name: what is done in the step."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.name = ""
        self.is_past = False

    def __str__(self) -> str:
        return f"step {self.number} {self.name}".rstrip()

    @contextmanager
    def disturbed(self, act: Callable[[], object], *, reads: bool = False) -> Iterator[None]:
        """Within, a run has `act` called before this step; see `at_step`."""
        gc.collect()  # a writer of an earlier run that is let go of within would count as a step
        with at_step(self.number, act, reads=reads) as taken:
            yield
        self._took(taken)

    def _took(self, taken: list[str]) -> None:
        self.is_past = len(taken) <= self.number
        self.name = "" if self.is_past else taken[self.number]

    def ended(self, code: int) -> None:
        """A process that was to die before this step has ended with a code."""
        assert code in (0, KILLED), f"{self}: exit code {code}"
        self.is_past = code == 0


def each_step(least: int = LEAST_STEPS) -> Iterator[Step]:
    """The steps of a run, and in the end one that is past: fails for a run of fewer than `least`, or without an end.

    The caller begins the run again for each, and has it disturbed before that step (`Step.disturbed`, `Step.ended`).
    """
    for number in range(MOST_STEPS):
        step = Step(number)
        yield step
        if step.is_past:
            assert number >= least, f"only {number} steps were taken"
            return
    raise AssertionError(f"more than {MOST_STEPS} steps")


def at_every_step(
    begin: Path, folder: Path, run: Callable[[str], object], act: Callable[[str], object]
) -> Iterator[str]:
    """Have `run` disturbed by `act`, each time on a new copy of the store `begin` below `folder`; the copies."""
    for step in each_step():
        store = str(shutil.copytree(begin, folder / f"{step.number}"))
        with step.disturbed(partial(act, store)), contextlib.suppress(Killed):
            run(store)
        if not step.is_past:
            yield store
