"""The live line: done, total, images a second, failures, time left. On a terminal it is a moving bar, in a log a line
every few seconds."""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.status import Status

from pipelines.errors import counted
from pipelines.running import json_log

LOG_SECONDS = 15.0
RATE_WINDOW_SECONDS = 60.0


class ProgressLine:
    """Shows how far a run is, on standard error.

    what: what is counted, in the plural. note: what the line says in place of failures.
    """

    def __init__(self, total: int, what: str = "images") -> None:
        self.total = total
        self.what = what
        self.done = 0
        self.failed = 0
        self.note = ""
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._began = self._logged_at = time.monotonic()
        self._time_and_done_when_warm: tuple[float, int] | None = None
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(f"0 of {self._all}, starting workers", total=total)

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def advance(self, done: int, failed: int) -> None:
        """Count images that were extracted and that failed since the last call."""
        self.done += done
        self.failed += failed
        now = time.monotonic()
        self._time_and_done_when_warm = self._time_and_done_when_warm or (now, self.done + self.failed)
        self._recent.append((now, self.done + self.failed))
        while len(self._recent) > 2 and now - self._recent[0][0] > RATE_WINDOW_SECONDS:
            self._recent.popleft()
        if self._bar:
            self._bar.update(self._task, completed=self.done + self.failed, description=self.text())
        elif now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            if json_log.active():
                json_log.event("progress", self.text(), **self.figures())
            else:
                print(self.text(), file=sys.stderr, flush=True)

    def restart(self, done: int, failed: int) -> None:
        """Begin another attempt at what is left: only settled images count."""
        self.done, self.failed = done, failed
        self._recent = deque([(time.monotonic(), done + failed)])

    @property
    def _all(self) -> str:
        return counted(self.total, self.what.removesuffix("s"))

    @property
    def images_per_second(self) -> float:
        """Over the last minute."""
        (then, before), (now, after) = self._recent[0], self._recent[-1]
        return (after - before) / (now - then) if now > then else 0.0

    @property
    def mean_images_per_second(self) -> float:
        """From the line's beginning until now, without failures."""
        return self.done / max(time.monotonic() - self._began, 1e-9)

    @property
    def steady_images_per_second(self) -> float:
        """From the first report to the last: without the start of Ray and its workers."""
        if self._time_and_done_when_warm is None or self._recent[-1][0] <= self._time_and_done_when_warm[0]:
            return 0.0
        (then, before), (now, after) = self._time_and_done_when_warm, self._recent[-1]
        return (after - before) / (now - then)

    @property
    def seconds_left(self) -> float | None:
        rate = self.images_per_second
        return (self.total - self.done - self.failed) / rate if rate > 0 else None

    def figures(self) -> dict[str, Any]:
        """The numbers of the line."""
        return {
            self.what: self.done,
            "failed": self.failed,
            "total": self.total,
            f"{self.what}_per_second": self.images_per_second,
            "seconds": time.monotonic() - self._began,
            "seconds_left": self.seconds_left,
        }

    def text(self) -> str:
        finished = self.done + self.failed
        rate = self.images_per_second
        left = timedelta(seconds=round(self.seconds_left)) if self.seconds_left is not None else "?"
        note = self.note or f"{self.failed:,} failed"
        return f"{finished:,} of {self._all}, {rate:,.1f} {self.what}/s, {note}, {left} left"

    def say(self, sentence: str) -> None:
        """A line of its own, which stays."""
        if self._bar:
            self._bar.console.print(sentence, highlight=False, markup=False)
        else:
            print(sentence, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


class StatusLine:
    """Shows on standard error what a job is doing: a changing line on a terminal, a line every few seconds in a log."""

    def __init__(self) -> None:
        self._logged_at = -LOG_SECONDS
        self._status: Status | None = None

    def __enter__(self) -> StatusLine:
        if sys.stderr.isatty():
            self._status = Console(stderr=True).status("starting workers")
            self._status.start()
        return self

    def show(self, text: str) -> None:
        if self._status:
            self._status.update(text)
        elif time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._logged_at = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()
