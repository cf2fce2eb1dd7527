"""Prometheus metrics of a job, through Ray's own endpoint, which puts `ray_` before each name.

Tags name neither images nor stores, so that the number of series stays small. Ray adds the node and the process.
Nothing is exported where Ray runs without the packages of its metrics agent (the `metrics` extra).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from pipelines.jobs import JOBS

DEVICE_BUSY_WINDOW_SECONDS = 10.0


class JobMetrics:
    """Counters of a job over images or pairs. Made inside a Ray session; kept by the driver, from workers' reports."""

    def __init__(self, command: str) -> None:
        from ray.util.metrics import Counter

        of = JOBS[command].unit

        def counter(name: str, about: str, *tags: str) -> Any:
            made = Counter(f"dinoray_{name}_total", description=about, tag_keys=("command", *tags))
            return made.set_default_tags({"command": command})

        self._done = counter(of, f"{of.capitalize()} whose rows were committed.")
        self._failed = counter("images_failed", "Images that were recorded as failures.", "stage", "error")
        self._read = counter("read_bytes", "Bytes of image files, or of tables, that were read.")
        self._written = counter("written_bytes", "Bytes of table files that were committed.")
        self._seconds = counter("stage_seconds", "Seconds spent, summed over workers.", "stage")

    def spent(self, seconds: Mapping[str, float]) -> None:
        """stage -> seconds, such as those of fetch, decode, model, write and commit."""
        for stage, value in seconds.items():
            _add(self._seconds, value, stage=stage)

    def read(self, size: int) -> None:
        _add(self._read, size)

    def committed(self, done: int, size: int, failures: Mapping[tuple[str, str], int] | None = None) -> None:
        """done: images or pairs. size: bytes. failures: (stage, error) -> images."""
        _add(self._done, done)
        _add(self._written, size)
        for (stage, error), count in (failures or {}).items():
            _add(self._failed, count, stage=stage, error=error)


class BusyDevice:
    """The part of the wall time that a worker's model computes, as a gauge of the worker's own process."""

    def __init__(self) -> None:
        self._gauge: Any = None
        self._since, self._busy = time.monotonic(), 0.0
        # workers also run without Ray
        if "ray" in sys.modules:
            from ray.util.metrics import Gauge

            about = "Seconds of the model in a second of a worker, over the last seconds."
            self._gauge = Gauge("dinoray_device_busy_ratio", description=about)

    def computed(self, seconds: float) -> None:
        """Count seconds of the model that have just passed."""
        self._busy += seconds
        elapsed = time.monotonic() - self._since
        if self._gauge is not None:
            self._gauge.set(min(1.0, self._busy / max(elapsed, 1e-9)))
        if elapsed > DEVICE_BUSY_WINDOW_SECONDS:
            self._since, self._busy = time.monotonic(), 0.0


def _add(counter: Any, value: float, **tags: str) -> None:
    # Ray's counters refuse 0
    if value > 0:
        counter.inc(value, tags=tags)
