"""run: the jobs of PIPELINE.yaml in order over one store, each only where there is something to do.

A job is up to date when it ended well with the same settings on the same content of what it reads, and what it left is
still there (pipelines/pipeline/state.py). `extract` is the exception: only a listing of INPUT tells what is new, so it
always runs, and ends in seconds when there is nothing. Nothing is locked: every job is safe beside another run of
itself, so two pipelines at once do the work once, or twice where they overlap, and what they agree on stands.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.errors import exit_code_of
from pipelines.jobs import INPUT, PIPELINE_COMMAND
from pipelines.pipeline.state import remember, state_before, why_to_run
from pipelines.running import json_log
from pipelines.running.ray_session import ray_session
from pipelines.running.reports import JobResult, RunReport, in_words, new_run_id, recorded
from pipelines.settings.calls import answer, given_settings
from pipelines.settings.pipeline_file import JobRequest, Pipeline, read_pipeline
from pipelines.settings.sections import Config
from pipelines.store.store import read_description

# After 3, too many images failed, but those that did not are in the store.
EXIT_CODES_TO_GO_ON = (0, 3)


@dataclass
class JobOutcome:
    """What became of a job.

    status: the job's own (done, unchanged, interrupted), or failed, not_run, would_run, would_fail. A job that did not
    have to run is unchanged, and has no run_id.
    """

    title: str
    status: str = "not_run"
    exit_code: int = 0
    why: str = ""
    seconds: float = 0.0
    run_id: str = ""
    result: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"seconds": round(self.seconds, 2)}


@dataclass
class Result(JobResult):
    """What a run of a pipeline did, or would do."""

    jobs: list[JobOutcome] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"jobs": [job.as_dict() for job in self.jobs]}


def run(pipeline: Pipeline, *, dry_run: bool = False, tell: Callable[[str], None] = lambda line: None) -> Result:
    """Run a pipeline; a job that fails ends it, unless only some images failed.

    tell: called with a line before and after every job.

    The exit code is that of the job that failed, 3 where more images failed than allowed, 130 when interrupted.
    """
    started = time.monotonic()
    result = Result(new_run_id(), storage.normalise(pipeline.store))
    result.jobs = [JobOutcome(job.title) for job in pipeline.jobs]
    asked = {"jobs": [job.title for job in pipeline.jobs]}
    report = None if dry_run else _Report(PIPELINE_COMMAND, result.store, pipeline.config, result.run_id, asked)
    with recorded(report, result, started):
        if dry_run:
            for job, outcome in zip(pipeline.jobs, result.jobs, strict=True):
                _plan_job(job, outcome, result.store)
                tell(f"{job.title}: {outcome.status}{f' ({outcome.why})' if outcome.why else ''}")
            result.status = "dry_run"
        else:
            with _SharedRay(pipeline.config) as ray:
                for job, outcome in zip(pipeline.jobs, result.jobs, strict=True):
                    if not _run_job(job, outcome, result, ray, tell):
                        break
            idle = all(outcome.status == "unchanged" for outcome in result.jobs)
            result.status = "failed" if result.exit_code not in EXIT_CODES_TO_GO_ON else "unchanged" if idle else "done"
    return result


def run_file(
    pipeline: str | Path,
    *,
    dry_run: bool = False,
    settings: Mapping[str, Any] | None = None,
    config: str | Path | Iterable[str | Path] = (),
) -> Result:
    """The jobs of a pipeline file over one store, each only where there is something to do; as `dinoray run`.

    Also where a job failed its result is returned: `status` and `jobs` say so. An interruption is a KeyboardInterrupt.
    """
    return answer(lambda: run(read_pipeline(Path(pipeline), given_settings(settings, config)), dry_run=dry_run))


class _Report(RunReport):
    """Of a pipeline. There is none until there is a store, which the first job may make."""

    def write(self, **more: Any) -> None:
        self.content |= more
        if read_description(self.content["store"], self.config) is not None:
            super().write()


def _run_job(
    job: JobRequest, outcome: JobOutcome, result: Result, ray: _SharedRay, tell: Callable[[str], None]
) -> bool:
    """Run a job where there is something to do, and note how it ended; whether the pipeline goes on."""
    began = time.monotonic()
    try:
        outcome.why = why_to_run(job, result.store)
        if not outcome.why:
            outcome.status = "unchanged"
            tell(f"{job.title}: unchanged")
            return True
        tell(f"{job.title}: {outcome.why}")
        if job.job.uses_ray:
            ray.start()
        before = state_before(job, result.store)
        done = _module(job).run(job.config, store=result.store, **job.arguments)
        _note(job, done, outcome, result)
        if done.exit_code == 0:
            remember(job, before, result.store)
    except KeyboardInterrupt:
        outcome.status, outcome.exit_code = "interrupted", 130
        raise
    except Exception as error:
        told = in_words(error, result.store)
        outcome.status, outcome.exit_code = "failed", exit_code_of(told) or 1
        outcome.why = " ".join(str(told).split())
        if exit_code_of(told) is None:
            raise
        result.exit_code = outcome.exit_code
        result.messages.append(f"{job.title} failed, and what comes after it was not run: {outcome.why}")
        return False
    finally:
        outcome.seconds = time.monotonic() - began if outcome.why else 0.0
    return done.exit_code in EXIT_CODES_TO_GO_ON


def _note(job: JobRequest, done: Any, outcome: JobOutcome, result: Result) -> None:
    """What a job says of itself, as its outcome. Raises KeyboardInterrupt where it was interrupted."""
    content = done.as_dict()
    json_log.finished(content, command=job.command)
    outcome.result, outcome.run_id = content, content.get("run_id", "")
    outcome.status, outcome.exit_code = getattr(done, "status", "done"), done.exit_code
    result.messages += [f"{job.title}: {message}" for message in getattr(done, "messages", ())]
    if done.exit_code == 0 and job.job.changes and not any(content[key] for key in job.job.changes):
        outcome.status = "unchanged"
    if done.exit_code == 130:
        raise KeyboardInterrupt
    if done.exit_code not in EXIT_CODES_TO_GO_ON or not result.exit_code:
        result.exit_code = done.exit_code


def _plan_job(job: JobRequest, outcome: JobOutcome, store: str) -> None:
    """What a job would do, by its own plan where the store is there already."""
    try:
        outcome.why = why_to_run(job, store)
        outcome.status = "would_run" if outcome.why else "unchanged"
        needs_store = INPUT not in job.job.reads
        if outcome.why and job.job.plans and not (needs_store and read_description(store, job.config) is None):
            planned = _module(job).run(job.config, store=store, dry_run=True, **job.arguments)
            outcome.result = planned.as_dict()
    except Exception as error:
        told = in_words(error, store)
        if (code := exit_code_of(told)) is None:
            raise
        outcome.status, outcome.exit_code, outcome.why = "would_fail", code, " ".join(str(told).split())


def _module(job: JobRequest) -> Any:
    return importlib.import_module(job.job.module)


class _SharedRay:
    """One Ray for all jobs of a pipeline, started when the first one needs it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._session: Any = None

    def __enter__(self) -> _SharedRay:
        return self

    def start(self) -> None:
        if self._session is None:
            self._session = ray_session(self._config.run)
            self._session.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._session is not None:
            self._session.__exit__(*error)
