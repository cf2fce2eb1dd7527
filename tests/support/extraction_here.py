"""extract without Ray, whose processes take longer to start than a few small images take. The model, the stages, the
store and everything else are those of every run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyarrow as pa

from pipelines.extract import job, streaming

RESOURCES = {"CPU": 4.0}

Blocks = Iterator[pa.Table]


def dataset_of(rows: pa.Table, block_size: int, report_each: bool) -> Blocks:
    return (rows.slice(at, block_size) for at in range(0, len(rows), block_size))


def map_with_actors(blocks: Blocks, worker: type, setup: Any, *sizes: Any, **options: Any) -> Blocks:
    """One worker has all blocks, one after the other; its setup travels as it does to another process."""
    return map_with_tasks(blocks, worker(setup=pickle.loads(pickle.dumps(setup))))


def map_with_tasks(blocks: Blocks, function: Callable[[pa.Table], Any], cpus: float = 1.0) -> Blocks:
    for block in blocks:
        found = function(block)
        yield from [found] if isinstance(found, pa.Table) else found


@contextmanager
def extraction_here() -> Iterator[None]:
    """Have the stages of extract at work in this process."""

    @contextmanager
    def session(*_: Any) -> Iterator[dict[str, float]]:
        yield RESOURCES

    streams = {"dataset_of": dataset_of, "map_with_actors": map_with_actors, "map_with_tasks": map_with_tasks}
    with (
        mock.patch.multiple(streaming, read_blocks=lambda blocks: blocks, **streams),
        mock.patch.multiple(job, ray_session=session, JobMetrics=lambda command: None),
    ):
        yield
