"""Disturbed jobs: one after the other is run, what came of it is noted, and all of it counted."""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from simulated_jobs import JOBS, Place
from walks import Walk

from pipelines.errors import DinorayError

RUNS_AGAIN = "run the same command again"


@dataclass
class Trial:
    """One disturbance, and what came of it. kind: kill, pause or walk (job: all its jobs; step: its seed). wrong: a
    word (lost, twice, wrong, stuck, unsound) and what was seen; empty where all is well. again: somebody said to run
    the same command again. untold: of those, one that said so by a traceback, since a file that it read was replaced
    and swept away without any retention."""

    kind: str
    job: str
    other: str
    step: int
    ended: bool = False
    wrong: str = ""
    again: bool = False
    untold: str = ""
    swept: bool = False
    leftovers: int = 0

    def __str__(self) -> str:
        if self.kind == "walk":
            return f"--walks 1 --seed {self.step} ({self.job}): {self.wrong}"
        how = "killed, then" if self.kind == "kill" else "paused for"
        return f"{self.job} {how} {self.other or 'itself again'}, step {self.step}: {self.wrong}"


@dataclass
class Figures:
    """What many trials came to."""

    counts: Counter[str] = field(default_factory=Counter)
    steps: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    untold: Counter[str] = field(default_factory=Counter)

    def take(self, trial: Trial) -> None:
        self.counts[f"{trial.kind}s"] += 1
        self.counts["again"] += trial.again
        self.counts["swept"] += trial.swept
        if trial.untold:
            self.counts["untold"] += 1
            paused = "" if trial.kind == "walk" else f"{trial.job}, paused for {trial.other}: "
            self.untold[f"{paused}{trial.untold.partition(': ')[0]}"] += 1
        self.counts["most leftovers"] = max(self.counts["most leftovers"], trial.leftovers)
        if trial.wrong:
            self.counts[trial.wrong.partition(":")[0]] += 1
            self.wrong.append(str(trial))
            print(trial, file=sys.stderr, flush=True)

    def take_walk(self, walk: Walk, trial: Trial) -> None:
        """walk: what came of it."""
        self.take(trial)
        self.counts["jobs of walks"] += len(walk)
        for fate in ("killed", "paused"):
            self.counts[f"{fate} in walks"] += sum(one.fate == fate for one in walk)


def run_job(place: Place, name: str, trial: Trial, *, may_fail: bool = False) -> bool:
    """Run a job; whether it said, in a sentence, that it is to run again."""
    try:
        result = JOBS[name](place)
    except DinorayError as error:
        if not may_fail:
            blame(trial, f"stuck: {name} said {error}")
        return True
    except Exception as error:
        if not may_fail or not isinstance(error, FileNotFoundError):
            blame(trial, f"stuck: {broke(name, error)}")
        trial.untold = trial.untold or broke(name, error)
        return True
    said = [message for message in result.messages if RUNS_AGAIN in message.lower()]
    if (result.exit_code or said) and not (said and may_fail):
        blame(trial, f"stuck: {name} ended with {result.exit_code}: {result.messages}")
    return bool(said)


def blame(trial: Trial, wrong: str) -> None:
    trial.wrong = trial.wrong or wrong


def broke(what: str, error: Exception) -> str:
    """An error that is no sentence, and where in the program it came from."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if "/pipelines/" in one.filename]
    where = " < ".join(f"{Path(one.filename).stem}.{one.name}" for one in frames[:-4:-1])
    return f"{what} broke in {where}: {type(error).__name__}: {str(error)[:200]}"
