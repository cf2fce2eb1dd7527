"""What workers finished and the driver has not committed yet: commits take many reports at once, by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from pipelines.running.interrupts import uninterrupted

COMMIT_SHARE = 0.3  # of run.commit_seconds that a report may wait; the rest is the time of the task that made it

Report = TypeVar("Report")


class WaitingReports(Generic[Report]):
    """Reports in the order of their arrival, handed to `commit` together."""

    def __init__(self, commit_seconds: float, commit: Callable[[list[Report]], None]) -> None:
        self._longest_wait = commit_seconds * COMMIT_SHARE
        self._commit = commit
        self._reports: list[Report] = []
        self._since = 0.0  # when the first of them came

    def add(self, report: Report) -> None:
        self._since = self._since if self._reports else time.monotonic()
        self._reports.append(report)

    def commit_when_due(self) -> None:
        """Commit when the first report has waited long enough."""
        if self._reports and time.monotonic() - self._since >= self._longest_wait:
            self.commit()

    def commit(self) -> None:
        """Commit what waits; an interruption comes after it."""
        if self._reports:
            with uninterrupted():
                reports, self._reports = self._reports, []
                self._commit(reports)
