"""Jobs as Python functions: what a command is given on the command line, as arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipelines.jobs import Argument, Job
from pipelines.settings.arguments import split_arguments
from pipelines.settings.loading import load_settings, make_config, merge_settings, nested
from pipelines.storage.errors import explain_failed_storage

_Result = TypeVar("_Result", bound=Any)


def function_of(job: Job) -> Callable[..., Any]:
    """A job as a function: its positions on the command line come first, everything else is given by keyword.

        function_of(JOBS["cluster"])("features", "words", settings={"cluster.k": 100})

    settings: nested ({"cluster": {"k": 100}}) or dotted ({"cluster.k": 100}) names. config: YAML files, as -c takes
    them. dry_run: plan only, for jobs that have a plan.

    The function returns the job's result, whose fields are those of --json. It raises the errors of pipelines.errors,
    and what `answer` raises.
    """
    signature = signature_of(job)

    def call(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named)
        given.apply_defaults()
        arguments = dict(given.arguments)
        settings = given_settings(arguments.pop("settings"), arguments.pop("config"))
        plan = {"dry_run": arguments.pop("dry_run")} if job.plans else {}
        own, as_settings = split_arguments(job, arguments)
        merge_settings(settings, nested(as_settings))
        return answer(lambda: job.run(make_config(settings), **own, **plan))

    call.__name__ = call.__qualname__ = job.command.replace(" ", "_")
    call.__doc__ = job.help
    vars(call)["__signature__"] = signature
    return call


def answer(job: Callable[[], _Result]) -> _Result:
    """What a job that is called from Python returns.

    Raises JobError where storage does not answer, as the command line says it, and KeyboardInterrupt where the job was
    interrupted and says so in its result.
    """
    try:
        result = job()
    except Exception as error:
        if (explained := explain_failed_storage(error)) is None:
            raise
        raise explained from error
    if result.status == "interrupted":
        raise KeyboardInterrupt
    return result


def signature_of(job: Job) -> inspect.Signature:
    """The signature of a job's function."""
    first = [one for one in job.all_arguments if one.position]
    named = [one for one in job.all_arguments if not one.position]
    position, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [_parameter(one, position) for one in first] + [_parameter(one, keyword) for one in named]
    if job.plans:
        parameters.append(inspect.Parameter("dry_run", keyword, default=False))
    for name, default in (("settings", None), ("config", ())):
        parameters.append(inspect.Parameter(name, keyword, default=default))
    return inspect.Signature(parameters)


def _parameter(argument: Argument, kind: Any) -> inspect.Parameter:
    needed = argument.position or argument.needed
    return inspect.Parameter(argument.name, kind, default=inspect.Parameter.empty if needed else argument.default)


def given_settings(settings: Mapping[str, Any] | None, files: str | Path | Iterable[str | Path] = ()) -> dict[str, Any]:
    """Settings of YAML files and, on top of them, those of a mapping, as nested plain data."""
    merged = load_settings([files] if isinstance(files, str | Path) else files)
    merge_settings(merged, nested(settings or {}))
    return merged
