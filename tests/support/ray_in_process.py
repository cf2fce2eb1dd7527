"""A stand-in for Ray that runs every task and actor at once, in the driver's own process: for jobs that are killed and
paused thousands of times, where starting Ray would take all the time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

CPUS = 2.0


class RayError(Exception):
    """What Ray raises for an error on a worker. cause: that error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.cause = cause


class Reference:
    """What a task returned or raised, or what was put."""

    def __init__(self, value: Any = None, error: Exception | None = None) -> None:
        self._value = value
        self._error = error

    @property
    def value(self) -> Any:
        if self._error is not None:
            raise RayError(self._error)
        return self._value


def get(references: Any) -> Any:
    return [one.value for one in references] if isinstance(references, list) else references.value


def wait(references: Sequence[Reference], num_returns: int = 1) -> tuple[list[Reference], list[Reference]]:
    return list(references[:num_returns]), list(references[num_returns:])


def remote(what: Any) -> _Remote:
    return _Remote(what)


class _Remote:
    """A function or a class that can be called on a worker."""

    def __init__(self, what: Any) -> None:
        self._what = what

    def options(self, **resources: Any) -> _Remote:
        return self

    def remote(self, *arguments: Any) -> Any:
        if isinstance(self._what, type):
            return _Actor(self._what(*map(_value, arguments)))
        try:
            return Reference(self._what(*map(_value, arguments)))
        except Exception as error:
            return Reference(error=error)


class _Actor:
    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __getattr__(self, method: str) -> _Remote:
        return _Remote(getattr(self._instance, method))


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, Reference) else argument


def _modules() -> dict[str, ModuleType]:
    names = ("ray", "ray.exceptions", "ray.util", "ray.util.metrics", "ray.util.annotations")
    made = {name: ModuleType(name) for name in names}
    functions: dict[str, Callable[..., Any]] = {"get": get, "wait": wait, "remote": remote, "put": Reference}
    vars(made["ray"]).update(functions, kill=lambda actor: None, nodes=list, is_initialized=lambda: False, __path__=[])
    vars(made["ray.exceptions"]).update(RayError=RayError, RayTaskError=RayError)
    vars(made["ray.util"]).update(__path__=[])
    vars(made["ray.util.metrics"]).update(dict.fromkeys(("Counter", "Gauge"), mock.MagicMock()))
    vars(made["ray.util.annotations"]).update(RayDeprecationWarning=DeprecationWarning)
    return made


@contextmanager
def ray_replaced() -> Iterator[None]:
    """Within: jobs find a session that is open, of this stand-in."""
    from pipelines.running.ray_session import _Open

    made = _modules()
    before, resources = {name: sys.modules.get(name) for name in made}, _Open.resources
    sys.modules.update(made)
    _Open.resources = {"CPU": CPUS}
    try:
        yield
    finally:
        _Open.resources = resources
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
