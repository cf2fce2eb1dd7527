"""Ray's few calls that a driver of tasks makes, done at once and in this process: no workers have to start."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


class Reference:
    """What a task gave, or the error that it ended with."""

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value, self.error = value, error


class RayError(Exception):
    pass


class RayTaskError(RayError):
    """As Ray wraps what a task raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Counter:
    """The counter of ray.util.metrics; its value is not asked for here."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        pass

    def set_default_tags(self, tags: dict[str, str]) -> Counter:
        return self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        pass


class Task:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def options(self, **options: Any) -> Task:
        return self

    def remote(self, *args: Any) -> Reference:
        given = [arg.value if isinstance(arg, Reference) else pickle.loads(pickle.dumps(arg)) for arg in args]
        try:
            return Reference(self._function(*given))
        except Exception as error:
            return Reference(error=error)


def get(reference: Any) -> Any:
    if isinstance(reference, list):
        return [get(one) for one in reference]
    if reference.error:
        raise RayTaskError(reference.error)
    return reference.value


def wait(references: list[Reference], num_returns: int = 1) -> tuple[list[Reference], list[Reference]]:
    """The last ones first: tasks finish in any order."""
    return references[-num_returns:], references[:-num_returns]


def use_local_ray(monkeypatch: pytest.MonkeyPatch, job: ModuleType, **resources: float) -> None:
    """Let a job's `ray_session` and `import ray` do everything in this process."""
    ray, exceptions, metrics = (ModuleType(name) for name in ("ray", "ray.exceptions", "ray.util.metrics"))
    vars(ray).update(remote=Task, get=get, put=Reference, wait=wait, exceptions=exceptions)
    vars(ray).update(is_initialized=lambda: True, cancel=lambda reference: None)
    vars(exceptions).update(RayError=RayError, RayTaskError=RayTaskError)
    vars(metrics).update(Counter=Counter)
    for module in (ray, exceptions, metrics):
        monkeypatch.setitem(sys.modules, module.__name__, module)

    @contextmanager
    def session(_: Any) -> Iterator[dict[str, float]]:
        yield {"CPU": 2.0, "memory": 4e9} | resources

    monkeypatch.setattr(job, "ray_session", session)
