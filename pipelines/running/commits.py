"""What workers have finished and the driver has not committed yet: each commit takes the reports of some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from pipelines.running.interrupts import uninterrupted
from pipelines.running.metrics import JobMetrics
from pipelines.running.reports import JobResult

# The rest of run.commit_seconds is for the task that makes the report.
LONGEST_WAIT_SHARE_OF_COMMIT_SECONDS = 0.3

Report = TypeVar("Report")


class WaitingReports(Generic[Report]):
    """Reports in the order of their arrival, handed to `commit` together. Counts the seconds of each stage.

    result, metrics: where seconds are counted. commit_seconds: run.commit_seconds.
    """

    def __init__(
        self,
        commit_seconds: float,
        commit: Callable[[list[Report]], None],
        result: JobResult | None = None,
        metrics: JobMetrics | None = None,
    ) -> None:
        self._longest_wait = commit_seconds * LONGEST_WAIT_SHARE_OF_COMMIT_SECONDS
        self._commit = commit
        self._result = result
        self._metrics = metrics
        self._reports: list[Report] = []
        self._first_came_at = 0.0

    def add(self, report: Report) -> None:
        self._first_came_at = self._first_came_at if self._reports else time.monotonic()
        self._reports.append(report)

    def commit_when_due(self) -> None:
        """Commit when the first report has waited long enough."""
        if self._reports and time.monotonic() - self._first_came_at >= self._longest_wait:
            self.commit()

    def commit(self) -> None:
        """Commit what waits; an interruption comes after it."""
        if self._reports:
            with uninterrupted():
                reports, self._reports = self._reports, []
                began = time.monotonic()
                self._commit(reports)
                self.spent({"commit": time.monotonic() - began})

    def spent(self, seconds: Mapping[str, float]) -> None:
        """Count seconds of stages, such as a worker's."""
        if self._result:
            for stage, value in seconds.items():
                self._result.spend(stage, value)
        if self._metrics:
            self._metrics.spent(seconds)
