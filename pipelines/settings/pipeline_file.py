"""PIPELINE.yaml: the jobs of a schedule over one store, in order, and a sentence for whatever is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import RequestError
from pipelines.jobs import PIPELINE_JOBS, Job
from pipelines.settings.arguments import split_arguments
from pipelines.settings.loading import make_config, merge_settings, nested, read_yaml
from pipelines.settings.sections import Config

_TOP = ("store", "settings", "jobs")


@dataclass(frozen=True)
class JobRequest:
    """One job of a pipeline. config: the pipeline's settings with the job's own on top."""

    command: str
    arguments: dict[str, Any]
    config: Config

    @property
    def job(self) -> Job:
        """Its entry in the table of jobs."""
        return PIPELINE_JOBS[self.command]

    @property
    def title(self) -> str:
        name = self.arguments.get("name") or self.arguments.get("output")
        return f"{self.command} {name}" if name else self.command


@dataclass(frozen=True)
class Pipeline:
    """store: as written. config: what all jobs share."""

    store: str
    jobs: list[JobRequest]
    config: Config


def read_pipeline(file: Path, settings: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a YAML file. settings: nested plain data that wins over the file's own.

    Raises RequestError with one sentence for the first mistake found.
    """
    content = read_yaml(file)
    where = f"The pipeline {file}"
    _known(content, _TOP, where)
    store = content.get("store")
    if not isinstance(store, str) or not store:
        raise RequestError(f"{where} has no store: give `store: FOLDER_OR_URI`.")
    shared: dict[str, Any] = {}
    merge_settings(shared, _mapping(content.get("settings"), f"{where}: settings"))
    entries = content.get("jobs")
    if not isinstance(entries, list) or not entries:
        raise RequestError(f"{where} has no jobs: give a list, such as `jobs: [{{extract: {{input: photos}}}}]`.")
    jobs = [_job(entry, number, shared, settings, where) for number, entry in enumerate(entries, 1)]
    titles = [job.title for job in jobs]
    # a job that always runs has nothing remembered under its name
    twice = next((job.title for job in jobs if titles.count(job.title) > 1 and not job.job.always_runs), None)
    if twice:
        raise RequestError(f"{where} has the job {twice} twice: give each a name of its own.")
    return Pipeline(store, jobs, _config(shared, {}, settings))


def _job(entry: Any, number: int, shared: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> JobRequest:
    place = f"{where}: job {number}"
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise RequestError(f"{place} must be one command with its arguments, such as `index: {{name: images}}`.")
    ((command, given),) = entry.items()
    _known({command: None}, tuple(PIPELINE_JOBS), place)
    job = PIPELINE_JOBS[command]
    arguments = dict(_mapping(given, f"{place} ({command})"))
    own = _mapping(arguments.pop("settings", None), f"{place} ({command}): settings")
    names = [argument.name for argument in job.all_arguments if argument.name != "store"]
    _known(arguments, (*names, "settings"), f"{place} ({command})")
    try:
        arguments, as_settings = split_arguments(job, dict.fromkeys(names) | arguments)
    except RequestError as error:
        raise RequestError(f"{place} ({command}): {error}") from None
    merged: dict[str, Any] = {}
    for part in (own, nested(as_settings)):
        merge_settings(merged, part)
    config, of_all = _config(shared, merged, settings), _config(shared, {}, settings)
    for name in config.run.OF_RAY_ITSELF:
        if getattr(config.run, name) != getattr(of_all.run, name):
            raise RequestError(
                f"{place} ({command}) has a run.{name} of its own, but all jobs of a pipeline share one Ray: give it "
                "in the settings of the pipeline."
            )
    return JobRequest(command, arguments, config)


def _config(shared: Mapping[str, Any], own: Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
    merged: dict[str, Any] = {}
    for part in (shared, own, settings):
        merge_settings(merged, part)
    return make_config(merged)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{what} must be keys with values, not a {type(value).__name__}.")
    return value


def _known(content: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known) or 'nothing'}."
            raise RequestError(f"{where} has an unknown key {key!r}: {hint}")
