"""cluster without Ray, whose processes would take longer to start than a small clustering takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from pipelines.cluster import actors
from pipelines.cluster import training as cluster_training
from pipelines.cluster.vectors import list_units, split_units
from pipelines.cluster.worker import ClusterWorker
from pipelines.running.interrupts import interruptible
from pipelines.running.progress import StatusLine


class LocalWorkers(cluster_training.Workers):
    """Workers in this process."""

    def _start(self, method: str, *args: Any) -> list[Any]:
        return [getattr(actor, method)(*args) for actor in self._actors]

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return self._start(method, *args)

    def _add(self, sums: list[Any]) -> Any:
        return sum(sums[1:], sums[0])


def use_local_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two workers in this process."""

    @contextmanager
    def workers(job: Any, images: pa.Table) -> Iterator[tuple[LocalWorkers, StatusLine]]:
        setup = actors.worker_setup(job, "cpu", 2, 1e9)
        shares = split_units(list_units(job.store, job.asked, images), 2)
        with interruptible(), StatusLine() as line:
            yield LocalWorkers([ClusterWorker(setup, share) for share in shares]), line

    monkeypatch.setattr(actors, "started_workers", workers)
