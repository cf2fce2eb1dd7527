"""Tasks on Ray: handed out as workers become free, their results taken in as they finish."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from pipelines.running.layout import Layout
from pipelines.running.ray_session import explain_ray_error

# A task writes files under names of its own, so it may run again.
TASK_TRIES_AFTER_WORKER_DEATH = 3


def as_task(function: Callable[..., Any], layout: Layout, *, gpu: bool = True) -> Any:
    """`function` as a Ray task with what the layout gives a worker; gpu=False: without its share of a GPU."""
    import ray

    return ray.remote(function).options(
        num_cpus=layout.cpus, num_gpus=layout.gpus if gpu else 0.0, max_retries=TASK_TRIES_AFTER_WORKER_DEATH
    )


def finished_tasks(submit: Callable[[], Any | None], workers: int, work: str) -> Generator[tuple[Any, Any]]:
    """Yield (task, what it returned) in the order in which tasks finish.

    submit: starts the next task and returns its reference, or None when there is none to start yet. It is called
    again after every task that finished, so that a task may wait for the result of another one. One task more than
    there are workers is submitted at any time, so that what it needs is read before a worker is free.

    work: what the tasks do, for messages, such as "the matching".

    Tasks that have not finished when the caller closes the iterator, or when one of them fails, are cancelled.

    Raises JobError for what stops a worker.
    """
    import ray
    from ray.exceptions import RayError

    waiting: list[Any] = []
    try:
        while True:
            while len(waiting) <= workers and (task := submit()) is not None:
                waiting.append(task)
            if not waiting:
                return
            (task,), waiting = ray.wait(waiting, num_returns=1)
            yield task, ray.get(task)
    except RayError as error:
        raise explain_ray_error(error, work) from None
    finally:
        # an iterator that is dropped rather than closed may end after Ray, which any call would start again
        for task in waiting if waiting and ray.is_initialized() else ():
            ray.cancel(task)
