"""The command `dinoray` with its workers in the driver's own process, for machines too busy to start Ray.

Listing, plan, workers' code, commits and reports are those of every run; only Ray between them is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipelines import cli, extract, workers
from pipelines.config import Config
from pipelines.shards import ShardReport
from pipelines.stages import FusedWorker, WorkerSetup
from pipelines.store import Store


def stream_reports(
    rows: pa.Table, block_size: int, layout: workers.Layout, store: Store, config: Config, run_id: str, **_: Any
) -> Iterator[ShardReport]:
    """As workers.stream_reports does it, one block after the other."""
    worker = FusedWorker(WorkerSetup(store.uri, run_id, config, "cpu", store.spec["model"]["weights"], threads=1))
    for begin in range(0, len(rows), block_size):
        for table in worker(rows.slice(begin, block_size)):
            yield from map(ShardReport.from_json, table["report"].to_pylist())


@contextmanager
def ray_session(*_: Any, **__: Any) -> Iterator[dict[str, float]]:
    yield {"CPU": 2.0}


if __name__ == "__main__":
    vars(workers)["stream_reports"] = stream_reports
    vars(extract).update(ray_session=ray_session, ImageMetrics=lambda command: None)
    cli.main()
