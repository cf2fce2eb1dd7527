"""What a job was given, whether by the command line, by a pipeline or from Python: checked and split in one way."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.errors import RequestError
from pipelines.jobs import Argument, Job


def split_arguments(job: Job, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the job's function, {setting: value} of those that stand for a setting), of what was given.

    given: by name, of `job.all_arguments`, the store perhaps apart. What is None was not given.

    Raises RequestError for one that is missing, is of another kind or is too small.
    """
    arguments, settings = {}, {}
    for argument in job.all_arguments:
        value = given.get(argument.name)
        if value is None or value == "":
            if argument.name in given and (argument.position or argument.needed):
                raise RequestError(f"{argument.name} is missing: give {argument.metavar or argument.name}.")
            continue
        taken = _taken(argument, value)
        if argument.setting:
            settings[argument.setting] = taken
        else:
            arguments[argument.name] = taken
    return arguments, settings


def _taken(argument: Argument, value: Any) -> Any:
    if not argument.many:
        return _one(argument, value)
    several = [value] if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable) else value
    return [_one(argument, one) for one in several]


def _one(argument: Argument, value: Any) -> Any:
    if argument.kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    right, as_kind, what = _KINDS[argument.kind]
    if not isinstance(value, right) or (argument.kind is not bool and isinstance(value, bool)):
        raise RequestError(f"{argument.name} is {value!r}, but should be {what}.")
    taken = as_kind(value)
    # NaN is not at least anything
    if argument.least is not None and not taken >= argument.least:
        raise RequestError(f"{argument.name} is {taken}, but should be at least {argument.least:g}.")
    return taken


_KINDS: dict[type, tuple[type, Any, str]] = {
    str: (str, str, "a text"),
    bool: (bool, bool, "true or false"),
    int: (numbers.Integral, operator.index, "a whole number"),
    float: (numbers.Real, float, "a number"),
}
