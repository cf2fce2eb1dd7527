"""Tasks are handed out a few at a time, and what a worker raised is a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from local_ray import Reference, Task, use_local_ray

from pipelines.cosegment import job
from pipelines.errors import JobError, RequestError
from pipelines.running.layout import Layout
from pipelines.running.tasks import as_task, finished_tasks

LAYOUT = Layout("cpu", 2, 1.0, 0.0)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    use_local_ray(monkeypatch, job)


def numbered(count: int, started: list[int]) -> Iterator[Any]:
    task = as_task(lambda number: number * number, LAYOUT)
    for number in range(count):
        started.append(number)
        yield task.remote(number)


def test_every_task_is_done_once_and_few_wait_at_a_time() -> None:
    started: list[int] = []
    upcoming = numbered(10, started)
    found = []
    for _, square in finished_tasks(lambda: next(upcoming, None), workers=2, work="the squaring"):
        found.append(square)
        assert len(started) - len(found) <= 2, "one more than there are workers, less the one that finished"
    assert sorted(found) == [number * number for number in range(10)]


def test_a_task_may_wait_for_another_one() -> None:
    first = as_task(lambda: 20, LAYOUT)
    second = as_task(lambda number: number + 1, LAYOUT)
    to_start: list[Reference] = [first.remote()]
    found = []
    for task, number in finished_tasks(lambda: to_start.pop() if to_start else None, workers=4, work="the adding"):
        assert isinstance(task, Reference)
        found.append(number)
        if number == 20:
            to_start.append(second.remote(number))
    assert found == [20, 21]


def test_no_tasks() -> None:
    assert list(finished_tasks(lambda: None, workers=1, work="nothing")) == []


@pytest.mark.parametrize(
    ("error", "expected", "sentence"),
    [
        (RequestError("Give less."), RequestError, "Give less."),
        (ValueError("no such thing"), JobError, "Ray could not run the squaring: no such thing"),
    ],
)
def test_what_a_task_raised_is_a_sentence(error: Exception, expected: type[Exception], sentence: str) -> None:
    def fail() -> None:
        raise error

    upcoming = iter([as_task(fail, LAYOUT).remote()])
    with pytest.raises(expected) as told:
        list(finished_tasks(lambda: next(upcoming, None), workers=1, work="the squaring"))
    assert str(told.value) == sentence


@pytest.mark.parametrize("ends", ["the caller stops", "a task fails", "all are done", "Ray has gone"])
def test_tasks_that_nobody_waits_for_are_cancelled(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[int] = []
    monkeypatch.setattr("ray.cancel", lambda reference: cancelled.append(reference.value), raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: ends != "Ray has gone")

    def work(number: int) -> int:
        if number == 2 and ends == "a task fails":
            raise ValueError("no such thing")
        return number

    task = as_task(work, LAYOUT)
    upcoming = iter([task.remote(number) for number in range(3)])
    finished = finished_tasks(lambda: next(upcoming, None), workers=2, work="the counting")
    if ends == "a task fails":
        with pytest.raises(JobError):
            list(finished)
    elif ends == "all are done":
        list(finished)
    else:
        assert next(finished)[1] == 2
        finished.close()
    assert cancelled == ([0, 1] if ends in ("the caller stops", "a task fails") else [])


def test_a_task_takes_what_the_layout_gives_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(Task, "options", lambda self, **options: asked.update(options) or self)
    on_gpu = Layout("cuda", 4, 0.5, 0.25)
    as_task(print, on_gpu)
    assert asked == {"num_cpus": 0.5, "num_gpus": 0.25, "max_retries": 3}
    as_task(print, on_gpu, gpu=False)
    assert asked["num_gpus"] == 0.0
