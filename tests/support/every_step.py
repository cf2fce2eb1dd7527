"""A run on copies of a store, disturbed before each of its steps on the way to storage in turn."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from trials import at_step

LEAST_STEPS = 6  # of a run that does anything worth disturbing


class Killed(BaseException):
    """What ends a run at one of its steps, as a kill does."""


def die(store: str) -> None:
    """To be had before a step."""
    raise Killed


def at_every_step(
    begin: Path, folder: Path, run: Callable[[str], object], act: Callable[[str], object]
) -> Iterator[str]:
    """Have `run` disturbed by `act`, each time on a new copy of the store `begin` below `folder`; the copies."""
    number = 0
    while True:
        store = str(shutil.copytree(begin, folder / f"{number}"))
        with at_step(number, partial(act, store)) as taken, contextlib.suppress(Killed):
            run(store)
        if len(taken) <= number:
            break
        yield store
        number += 1
    assert number >= LEAST_STEPS, f"only {number} steps were taken"
