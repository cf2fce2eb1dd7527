"""Blocks through pools of stateful workers on Ray Data: what goes in, who maps it, and reading what comes out."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from pipelines.running.ray_session import explain_ray_error

RAY_DATA_READING_THREAD_NAME = "iter_threaded"
READING_THREAD_END_SECONDS = 10.0
# A Ray that does nothing for this long is stuck, not slow.
RAY_NO_PROGRESS_SECONDS = 1800


def dataset_of(rows: pa.Table, block_size: int, report_each: bool) -> Any:
    """Listing rows in blocks. report_each: what a worker yields arrives at once, not when its block is done."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # blocks whose task failed are dropped; the caller knows what is undone
    context.max_errored_blocks = -1
    context.target_max_block_size = 1 if report_each else None
    context.execution_no_progress_timeout_s = RAY_NO_PROGRESS_SECONDS

    # `take` copies, so that a block does not carry the whole table's buffers with it
    starts = range(0, len(rows), block_size)
    blocks = [rows.take(pa.array(range(at, min(at + block_size, len(rows))), pa.int64())) for at in starts]
    return ray.data.from_arrow(blocks)


def map_with_actors(
    dataset: Any,
    worker: type,
    setup: Any,
    count: int | tuple[int, int],
    cpus: float,
    gpus: float = 0.0,
    threads: int = 1,
) -> Any:
    """Map blocks with a pool of `worker` actors, of fixed or (least, most) size; each has `threads` blocks at once.

    No block waits at an actor for another one: it would be lost with it. A dead worker is replaced, but Ray does not
    run its block again: it would do so forever, and the replay of a half-read generator could lose or repeat
    reports. The caller sees which images are undone.
    """
    from ray.data import ActorPoolStrategy

    least, most = (count, count) if isinstance(count, int) else count
    with _without_deprecation_warning():
        return dataset.map_batches(
            worker,
            fn_constructor_kwargs={"setup": setup},
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_tasks_in_flight_per_actor=threads,
                enable_true_multi_threading=threads > 1,
            ),
            max_concurrency=threads,
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=0,
        )


def map_with_tasks(dataset: Any, function: Callable[[pa.Table], pa.Table], cpus: float) -> Any:
    """Map blocks with a function that keeps nothing; a task that dies is not run again, as in `map_with_actors`."""
    with _without_deprecation_warning():
        return dataset.map_batches(function, batch_size=None, batch_format="pyarrow", num_cpus=cpus, max_retries=0)


@contextlib.contextmanager
def _without_deprecation_warning() -> Iterator[None]:
    """Ray's limits on retries have no other way in until Ray 2.64, which pyproject.toml therefore excludes."""
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


def read_blocks(dataset: Any) -> Iterator[pa.Table]:
    """The blocks of a dataset as they are made. Raises what `explain_ray_error` makes of Ray's errors.

    Close it while Ray is there: Ray Data that is stopped later starts another Ray to do so, and hangs.
    """
    from ray.exceptions import RayError

    others = set(threading.enumerate())
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except RayError as error:
        raise explain_ray_error(error, "the extraction") from None
    finally:
        # Its threads live a moment longer than the iterator, and a reference that one of them drops when Ray has gone
        # ends this process without a word.
        for thread in set(threading.enumerate()) - others:
            if thread.name == RAY_DATA_READING_THREAD_NAME:
                thread.join(READING_THREAD_END_SECONDS)
