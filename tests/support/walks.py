"""Random walks: three or four jobs, of which some are killed and some stand still while the following ones run; and the
orders, one job after the other, that such a walk may be like."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from simulated_jobs import PARTS_OF_RUN, prune_as_planned

LENGTHS = (3, 4)
FATES = ("killed", "paused", "whole")
WEIGHTS = (3, 4, 1)
ADDING, CHANGING = "extract new", "extract changed"


@dataclass(frozen=True)
class Planned:
    """A job of a walk. fate: it is killed before a step, or paused there until the following ones are done, or runs
    whole."""

    job: str
    fate: str
    step: int = 0

    def __str__(self) -> str:
        return self.job if self.fate == "whole" else f"{self.job} {self.fate} at {self.step}"


Walk = tuple[Planned, ...]
Order = tuple[str, ...]


def random_walk(seed: int, steps: Mapping[str, int]) -> Walk:
    """steps: how many each job has; these jobs are chosen from. The last job of a walk runs whole."""
    random = Random(seed)
    jobs = random.choices(sorted(steps), k=random.choice(LENGTHS))
    disturbed = [Planned(job, random.choices(FATES, WEIGHTS)[0], random.randrange(steps[job])) for job in jobs[:-1]]
    return (*disturbed, Planned(jobs[-1], "whole"))


def orders_like(walk: Walk, again: Collection[int]) -> list[Order]:
    """All orders in which the jobs of a walk may seem to have run, the same command of some run once more at the end.

    walk: what came of it: a job that ended before its step is whole. again: positions of those that were killed or said
    to run them again, which may have done all of their work, or some parts, or nothing.
    """
    rerun = tuple(part for at in sorted(again) for part in _parts(walk[at].job))
    return list(dict.fromkeys((*order, *rerun) for order in _orders(walk, 0, again)))


def _orders(walk: Walk, at: int, again: Collection[int]) -> Iterator[Order]:
    if at == len(walk):
        yield ()
        return
    parts = _parts(walk[at].job)
    for after in _orders(walk, at + 1, again):
        for done in range(len(parts), -1 if at in again else len(parts) - 1, -1):
            if walk[at].fate == "paused":
                yield from _around(parts[:done], after)
            else:
                yield (*parts[:done], *after)


def _parts(job: str) -> Order:
    """What a job does one after the other; nothing that can be seen in the rows for `compact`."""
    return PARTS_OF_RUN if job == "run" else () if job == "compact" else (job,)


def _around(parts: Order, inner: Order) -> Iterator[Order]:
    """Parts of a job that was paused while others ran: those before, the one in which it was paused, those after."""
    if not parts:
        yield inner
    for at, part in enumerate(parts):
        for before in (len(inner), *range(len(inner))):
            for name in _ways_of(part, inner[:before]):
                yield (*parts[:at], *inner[:before], name, *inner[before:], *parts[at + 1 :])


def _ways_of(part: str, before: Sequence[str]) -> Iterator[str]:
    """What was extracted after a prune was planned, it neither removes nor extracts again."""
    yield part
    if part == "prune" and (ADDING in before or CHANGING in before):
        yield prune_as_planned(new=ADDING in before, changed=CHANGING in before)
