"""Jobs in processes of their own that stop before a step, so that others run meanwhile, or so that they are killed."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from typing import Any

from simulated_jobs import Place
from storage_steps import at_step
from trials import Trial, blame, run_job
from walks import Planned, Walk


class Stopped:
    """A job in a process of its own, which stops before a step, where it comes to that, until it is told to go on."""

    def __init__(self, place: Place, planned: Planned, trial: Trial, *, may_fail: bool) -> None:
        to_child, self._go_on = os.pipe()
        self._reports, from_child = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                be_quiet()
                with os.fdopen(from_child, "wb", buffering=0) as writer:
                    step = sys.maxsize if planned.fate == "whole" else planned.step
                    with at_step(step, lambda: _stop(writer, to_child), reads=True):
                        again = run_job(place, planned.job, trial, may_fail=may_fail)
                    pickle.dump((again, trial), writer)
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os.close(to_child)
        os.close(from_child)
        self._reader = os.fdopen(self._reports, "rb")
        self._report = pickle.load(self._reader)

    @property
    def stands(self) -> bool:
        return self._report is None

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._close()

    def end(self) -> tuple[bool, Trial]:
        """Go on; whether it is to run again, and the trial with what was wrong."""
        if self.stands:
            os.write(self._go_on, b".")
            self._report = pickle.load(self._reader)
        self._close()
        again, trial = self._report
        return again, trial

    def _close(self) -> None:
        os.waitpid(self._pid, 0)
        os.close(self._go_on)
        self._reader.close()


def _stop(writer: Any, go_on: int) -> None:
    pickle.dump(None, writer)
    if not os.read(go_on, 1):
        os._exit(1)  # the process that would say so is gone


def took(place: Place, walk: Walk, at: int, trial: Trial, overlapped: bool = False) -> tuple[Walk, set[int], Trial]:
    """Have the jobs of a walk run as planned, from one on; what came of them, and those that are to run again.

    overlapped: an earlier one is paused meanwhile, so that these may be told to run again.
    """
    if at == len(walk):
        return (), set(), trial
    planned = walk[at]
    job = Stopped(place, planned, trial, may_fail=overlapped or planned.fate == "paused")
    if job.stands and planned.fate == "paused":
        rest, again, trial = took(place, walk, at + 1, trial, overlapped=True)
        to_run_again, of_job = job.end()
        blame(trial, of_job.wrong)
        trial.untold = trial.untold or of_job.untold
        return (planned, *rest), again | ({at} if to_run_again else set()), trial
    if job.stands:
        job.kill()
        rest, again, trial = took(place, walk, at + 1, trial, overlapped)
        return (planned, *rest), again | {at}, trial
    to_run_again, trial = job.end()
    rest, again, trial = took(place, walk, at + 1, trial, overlapped)
    return (Planned(planned.job, "whole"), *rest), again | ({at} if to_run_again else set()), trial


def be_quiet() -> None:
    """Progress of jobs goes nowhere; tracebacks of this program still reach `sys.__stderr__`."""
    sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
