"""What a job's result depends on and what the job left, remembered from one run of a pipeline to the next.

A job is up to date when it ended well with the same settings on the same content of everything that it reads (tables,
results of other jobs, files that its settings name), and what it left then is still there. What a job reads is said in
jobs.py alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import storage
from pipelines.errors import DinorayError, JobError, RequestError
from pipelines.jobs import CLUSTERING_PREFIX, INPUT, RESULTS_OF_ALL_JOBS
from pipelines.results.all_kinds import KINDS, all_results, find_result
from pipelines.settings.pipeline_file import JobRequest
from pipelines.sources.id_files import is_id_file
from pipelines.storage.secrets import hidden
from pipelines.store.store import Store, read_description


@dataclass(frozen=True)
class JobState:
    """settings: a hash of what was asked for. reads: the content of what the job depends on. made: of what it left."""

    settings: str
    reads: dict[str, str]
    made: dict[str, str]


def why_to_run(job: JobRequest, store: str) -> str:
    """Why a job has to run, in words; empty when it is up to date."""
    if job.job.always_runs:
        return "looks for images that are new or changed" if INPUT in job.job.reads else "runs every time"
    before = _remembered(job, store)
    if before is None:
        return "did not run before in this pipeline"
    opened = _open(job, store)
    if opened is None:
        return "there is no store"
    if before.settings != _settings(job, opened):
        return "its settings changed"
    now = _reads(job, opened)
    changed = [name for name in {**now, **before.reads} if before.reads.get(name) != now.get(name)]
    if changed:
        return f"{' and '.join(changed)} changed since"
    return _what_is_wrong_with(before.made, job, opened)


def state_before(job: JobRequest, store: str) -> JobState | None:
    """The state that a job begins with; None where nothing is remembered of it."""
    opened = None if job.job.always_runs else _open(job, store)
    return None if opened is None else JobState(_settings(job, opened), _reads(job, opened), {})


def remember(job: JobRequest, before: JobState | None, store: str) -> None:
    """Note that a job ended well: what it began with, and what it left."""
    opened = None if job.job.always_runs else _open(job, store)
    if opened is not None:
        # a job that made its own store began with nothing
        began = before or JobState(_settings(job, opened), {}, {})
        state = JobState(began.settings, began.reads, _made(job, opened))
        storage.write_json(_memory_uri(job, store), asdict(state), job.config.storage.options)


def _open(job: JobRequest, store: str) -> Store | None:
    return None if read_description(store, job.config) is None else Store.open(store, job.config)


def _settings(job: JobRequest, store: Store) -> str:
    asked = job.config.model_dump(mode="json")
    section = {job.job.section: asked[job.job.section]} if job.job.section else {}
    content = json.dumps([job.command, job.arguments, section, store.fingerprint], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _reads(job: JobRequest, store: Store) -> dict[str, str]:
    """The content of everything that a job depends on, by name; what is not there is left out."""
    found: dict[str, str] = {}
    for name in job.job.reads:
        if name == RESULTS_OF_ALL_JOBS:
            found |= {result.path: _version(result) for result in all_results(store)}
        elif name in KINDS:
            found |= {result.path: _version(result) for result in all_results(store) if result.kind == name}
        else:
            found[name] = getattr(store, name).content_identity
    for value in _named_files(job):
        found |= _reference(value, store)
    return found


def _named_files(job: JobRequest) -> Iterator[str]:
    """Values of arguments and settings that may name a file, or a clustering."""
    section = getattr(job.config, job.job.section, None)
    for name in job.job.files:
        value = job.arguments.get(name) or getattr(section, name, None)
        values = [value] if isinstance(value, str) else value or ()
        yield from (str(one) for one in values)


def _reference(value: str, store: Store) -> dict[str, str]:
    """The content of what a value names: a clustering, or a file that lists images. Other values name nothing."""
    if value.startswith(CLUSTERING_PREFIX):
        result = _found(store, f"clusters/{value.removeprefix(CLUSTERING_PREFIX)}")
        return {} if result is None else {result.path: _version(result)}
    if not is_id_file(value):
        return {}
    try:
        return {hidden(value): storage.sha256(storage.normalise(value), store.config.storage.options)}
    except OSError:
        # the job says what is wrong with it
        return {}


def _made(job: JobRequest, store: Store) -> dict[str, str]:
    """The content of what a job left, by path; what is not there is left out."""
    if job.job.makes:
        result = _found(store, f"{job.job.makes}/{job.arguments['name']}")
        return {} if result is None else {result.path: _version(result)}
    if job.job.output:
        output = job.arguments.get(job.job.output) or storage.join(store.uri, job.job.default_output)
        try:
            return {hidden(output): storage.sha256(storage.normalise(output), store.config.storage.options)}
        except OSError:
            return {}
    return {}


def _what_is_wrong_with(made: dict[str, str], job: JobRequest, store: Store) -> str:
    """Why what a job left has to be made again, in words; empty when it is as the job left it."""
    now = _made(job, store)
    for path, version in made.items():
        if path not in now:
            return f"{path} is gone"
        if now[path] != version:
            return f"{path} was changed or damaged since"
        if job.job.makes and (missing := _missing(store, path)):
            return missing
    return ""


def _found(store: Store, path: str) -> Any | None:
    try:
        return find_result(store, path)
    except RequestError:
        # a name that cannot be a result's: the job says so
        return None


def _version(result: Any) -> str:
    try:
        return result.version()
    except DinorayError as error:
        return str(error)


def _missing(store: Store, path: str) -> str:
    try:
        result = find_result(store, path)
        return "" if result is None else result.missing()
    except DinorayError as error:
        return str(error)


def _memory_uri(job: JobRequest, store: str) -> str:
    name = job.arguments.get("name")
    # a job without a NAME is known by the file that it writes
    if name is None:
        name = hashlib.sha256(str(job.arguments.get(job.job.output)).encode()).hexdigest()[:12]
    return storage.join(store, "pipeline", f"{job.command}-{name}.json")


def _remembered(job: JobRequest, store: str) -> JobState | None:
    """The state at the last good end of a job; None also for a note that is damaged or comes from an older dinoray."""
    try:
        found = storage.read_json(_memory_uri(job, store), job.config.storage.options)
    except JobError:
        return None
    return JobState(**found) if found is not None and found.keys() == {"settings", "reads", "made"} else None
