"""run: the jobs of PIPELINE.yaml in order over one store, each only where there is something to do.

A job is up to date when it ended well with the same settings on the same versions of the tables that it reads.
`extract` is the exception: only a listing of INPUT tells what is new, so it always runs, and ends in seconds when there
is nothing. Nothing is locked: every job is safe beside another run of itself, so two pipelines at once do the work
once, or twice where they overlap, and what they agree on stands.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipelines import storage
from pipelines.errors import JobError, exit_code_of
from pipelines.results.clusters import ClusterTables
from pipelines.results.indices import index_names, latest_manifest
from pipelines.results.matches import MatchTables
from pipelines.results.parts import PartTables
from pipelines.running import json_log
from pipelines.running.ray_session import ray_session
from pipelines.running.reports import RunReport, new_run_id
from pipelines.settings.pipeline_file import JobRequest, Pipeline
from pipelines.settings.sections import Config
from pipelines.store.store import Store, read_description

ALWAYS = ("extract", "verify", "compact")  # what they look at is not in the tables' versions alone
WITHOUT_RAY = ("index", "report", "verify", "compact")
GOES_ON = (0, 3)  # 3: too many images failed; those that did not are in the store
# Sections of the settings that decide what a job makes, besides its arguments.
SECTIONS = {
    "index": "index",
    "cluster": "cluster",
    "cosegment": "cosegment",
    "correspond": "correspond",
    "report": "report",
}


@dataclass
class JobOutcome:
    """What became of a job.

    status: the job's own (done, unchanged, interrupted), or up_to_date, failed, not_run, would_run, would_fail.
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
class Result:
    """What a run of a pipeline did, or would do."""

    run_id: str
    store: str
    status: str = "running"  # running | done | unchanged | failed | interrupted | dry_run
    exit_code: int = 0
    jobs: list[JobOutcome] = field(default_factory=list)
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"jobs": [job.as_dict() for job in self.jobs], "seconds": round(self.seconds, 2)}


def run(pipeline: Pipeline, *, dry_run: bool = False, tell: Callable[[str], None] = lambda line: None) -> Result:
    """Run a pipeline; a job that fails ends it, unless only some images failed.

    tell: is called with a line before and after every job.

    The exit code is that of the job that failed, 3 where more images failed than allowed, 130 when interrupted.
    """
    started = time.monotonic()
    config = pipeline.config
    result = Result(new_run_id(), storage.normalise(pipeline.store))
    result.jobs = [JobOutcome(job.title) for job in pipeline.jobs]
    try:
        with _SharedRay(config) as ray:
            for job, outcome in zip(pipeline.jobs, result.jobs, strict=True):
                outcome.why = _why(job, result.store)
                if not outcome.why:
                    outcome.status = "up_to_date"
                    tell(f"{job.title}: up to date")
                    continue
                if dry_run:
                    _plan(job, outcome, result.store)
                    tell(f"{job.title}: {outcome.status} ({outcome.why})")
                    continue
                tell(f"{job.title}: {outcome.why}")
                if job.command not in WITHOUT_RAY:
                    ray.start()
                if not _run_job(job, outcome, result):
                    break
    except KeyboardInterrupt:
        result.status, result.exit_code = "interrupted", 130
        result.messages.append("Interrupted: what is committed stays, and the same command continues.")
    result.seconds = time.monotonic() - started
    if dry_run:
        result.status = "dry_run"
        return result
    if result.status == "running":
        idle = all(outcome.status in ("up_to_date", "unchanged") for outcome in result.jobs)
        result.status = "failed" if result.exit_code not in GOES_ON else "unchanged" if idle else "done"
    if read_description(result.store, config) is not None:
        report = RunReport("run", result.store, config, result.run_id, {"jobs": [job.title for job in pipeline.jobs]})
        report.finish(result.status, result=result.as_dict())
    return result


def _run_job(job: JobRequest, outcome: JobOutcome, result: Result) -> bool:
    """Run a job and note how it ended; whether the pipeline goes on."""
    began = time.monotonic()
    before = _state(job, result.store)
    try:
        done = _module(job).run(job.config, store=result.store, **job.arguments)
    except KeyboardInterrupt:
        outcome.status, outcome.exit_code = "interrupted", 130
        raise
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        outcome.status, outcome.exit_code = "failed", code
        outcome.why = " ".join(str(error).split())
        result.exit_code = code
        result.messages.append(f"{job.title} failed, and what comes after it was not run: {outcome.why}")
        return False
    finally:
        outcome.seconds = time.monotonic() - began
    content = done.as_dict()
    json_log.finished(content, command=job.command)
    outcome.result, outcome.run_id = content, content.get("run_id", "")
    outcome.status, outcome.exit_code = getattr(done, "status", "done"), done.exit_code
    result.messages += [f"{job.title}: {message}" for message in getattr(done, "messages", ())]
    if job.command == "extract" and not content["extracted"] and not content["pruned"] and not done.exit_code:
        outcome.status = "unchanged"
    result.exit_code = result.exit_code or done.exit_code
    if done.exit_code == 130:
        raise KeyboardInterrupt
    if done.exit_code not in GOES_ON:
        result.exit_code = done.exit_code
        return False
    if job.command not in ALWAYS and done.exit_code == 0:
        _remember(job, before, result.store)
    return True


def _plan(job: JobRequest, outcome: JobOutcome, store: str) -> None:
    """What a job would do, by its own plan where the store is there already."""
    outcome.status = "would_run"
    if job.command == "verify" or (job.command != "extract" and read_description(store, job.config) is None):
        return
    try:
        outcome.result = _module(job).run(job.config, store=store, dry_run=True, **job.arguments).as_dict()
    except Exception as error:
        if (code := exit_code_of(error)) is None:
            raise
        outcome.status, outcome.exit_code, outcome.why = "would_fail", code, " ".join(str(error).split())


def _why(job: JobRequest, store: str) -> str:
    """Why a job has to run; empty when it is up to date."""
    if job.command == "extract":
        return "looks for images that are new or changed"
    if job.command in ALWAYS:
        return "runs every time"
    now, before = _state(job, store), _remembered(job, store)
    if before is None:
        return "did not run before in this pipeline"
    if before["settings"] != now["settings"]:
        return "its settings changed"
    names = {**now["versions"], **before["versions"]}
    changed = [name for name in names if before["versions"].get(name) != now["versions"].get(name)]
    return f"{' and '.join(changed)} changed since" if changed else ""


def _state(job: JobRequest, store: str) -> dict[str, Any]:
    """What a job's result depends on: its settings, and the versions of the tables that it reads."""
    if job.command in ALWAYS or read_description(store, job.config) is None:
        return {"settings": "", "versions": {}}
    opened = Store.open(store, job.config)
    asked = job.config.model_dump(mode="json")
    decides = {key: asked[key] for key in (SECTIONS[job.command],) if key in asked}
    content = json.dumps([job.command, job.arguments, decides, opened.fingerprint], sort_keys=True)
    versions = {"images": opened.images.content_version, "patches": opened.patches.content_version}
    if job.command == "report":
        versions |= _result_versions(opened)
    return {"settings": hashlib.sha256(content.encode()).hexdigest()[:16], "versions": versions}


def _result_versions(store: Store) -> dict[str, int]:
    """The versions of what other jobs made, by its folder: a report shows all of it."""
    options = store.config.storage.options
    clusters, parts = ClusterTables.all_in(store.uri, options), PartTables.all_in(store.uri, options)
    versions = {f"clusters/{name}": tables.assignments.content_version for name, tables in clusters.items()}
    versions |= {f"parts/{name}": two.images.content_version for name, two in parts.items()}
    matches = MatchTables.all_in(store.uri, options)
    versions |= {f"matches/{name}": found.pairs.content_version for name, found in matches.items()}
    return versions | {f"index/{name}": latest_manifest(store, name) for name in index_names(store)}


def _memory_uri(job: JobRequest, store: str) -> str:
    name = job.arguments.get("name")
    if name is None:  # a report, which is known by where it goes
        name = hashlib.sha256(str(job.arguments.get("output")).encode()).hexdigest()[:12]
    return storage.join(store, "pipeline", f"{job.command}-{name}.json")


def _remembered(job: JobRequest, store: str) -> dict[str, Any] | None:
    """The state at the last good end of a job; a damaged note is as none, and the job runs."""
    try:
        found = storage.read_json(_memory_uri(job, store), job.config.storage.options)
    except JobError:
        return None
    return found if found is not None and {"settings", "versions"} <= found.keys() else None


def _remember(job: JobRequest, state: dict[str, Any], store: str) -> None:
    storage.write_json(_memory_uri(job, store), state, job.config.storage.options)


def _module(job: JobRequest) -> Any:
    return importlib.import_module(f"pipelines.{job.command}")


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
