"""Run reports: runs/RUN_ID.json says what was asked, what was done, how fast, and what failed."""

from __future__ import annotations

import contextlib
import datetime as dt
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from importlib import metadata
from typing import Any, Self

from deltalake.exceptions import DeltaError

from pipelines import storage
from pipelines.errors import DinorayError, JobError
from pipelines.running import json_log
from pipelines.running.interrupts import interruptible, uninterrupted
from pipelines.running.json_data import json_data
from pipelines.settings.sections import Config
from pipelines.storage.errors import explain_write_error


def new_run_id() -> str:
    """Sortable by time, unique without coordination."""
    return f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


class RunReport:
    """One run's report. It is written when the run starts and again whenever that says more."""

    def __init__(
        self, command: str, store: str, config: Config, run_id: str, asked: dict[str, Any], *, optional: bool = False
    ) -> None:
        """optional: for a job that only reads; a store that belongs to somebody else may refuse the report, and the
        figures are worth having all the same. Such a report is written at the end only.

        content["status"]: running, done, failed or interrupted."""
        self.optional = optional
        self._uri = storage.join(store, "runs", f"{run_id}.json")
        self.config = config
        self.content: dict[str, Any] = {
            "run_id": run_id,
            "command": command,
            "status": "running",
            "started_at": _now(),
            "finished_at": None,
            "store": store,
            "asked": asked,
            "settings": config.without_secrets(),
            "dinoray": metadata.version("dinoray"),
            "machine": {"python": platform.python_version(), "processor": platform.machine()},
        }

    def begin(self, **more: Any) -> None:
        """Say that the run has started."""
        if self.optional:
            self.content |= more
        else:
            self.write(**more)

    def write(self, **more: Any) -> None:
        self.content |= more
        storage.write_json(self._uri, json_data(self.content), self.config.storage.options)

    def finish(self, status: str, **more: Any) -> dict[str, Any]:
        self.write(status=status, finished_at=_now(), **more)
        return self.content


@dataclass
class JobResult:
    """What every job says of itself; --json prints it, and its run report holds the same.

    status: running, done, unchanged (there was nothing to do), failed, interrupted or dry_run. seconds: by stage, and
    `total`. messages: sentences that are worth knowing.
    """

    run_id: str
    store: str
    _: KW_ONLY
    status: str = "running"
    exit_code: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def ended(self, status: str, started: float) -> Self:
        """The result of a run that ended before it did anything. started: time.monotonic() when it began."""
        self.status = status
        self.seconds["total"] = time.monotonic() - started
        return self

    @property
    def total_seconds(self) -> float:
        """Of the whole run, once it has ended."""
        return self.seconds.get("total", 0.0)

    def spend(self, stage: str, seconds: float) -> None:
        """Count seconds of a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def as_dict(self) -> dict[str, Any]:
        """As plain data, as JSON has it."""
        return self.__dict__ | {"seconds": {stage: round(value, 3) for stage, value in self.seconds.items()}}


@dataclass
class IncrementalResult(JobResult):
    """What every job says that does only what is new or changed. It counts images, or pairs.

    already_done, pending: what was done when it was planned, and what was left. done_elsewhere: what another run
    committed at the same time. repaired: what -> how many, of what earlier runs left.
    """

    _: KW_ONLY
    already_done: int = 0
    pending: int = 0
    done_elsewhere: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    repaired: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def recorded(
    report: RunReport | None, result: JobResult, started: float, told: Sequence[str] = (), **first: Any
) -> Iterator[None]:
    """A job inside a report that says how it ended, whichever way it does.

    report: None for a job that only reads and leaves no report. first: what the report says from its beginning.
    started: time.monotonic() when the run began. told: what else is worth knowing at the end, such as a store's log has
    to say. The block may set a status of its own.

    An interruption ends the block and becomes the result, with exit code 130; one that comes before the block passes
    through, and one that comes after it waits for the report. Errors pass through, write errors in words (JobError).
    """
    began = False
    try:
        if report is not None:
            report.begin(**first)
            with json_log.about(command=report.content["command"], run_id=report.content["run_id"]):
                began = True
                yield
        else:
            began = True
            yield
        if result.status == "running":
            result.status = "done"
    except KeyboardInterrupt:
        result.status, result.exit_code = "interrupted", 130
        result.messages.append("Interrupted: what is committed stays, and the same command continues.")
        if not began:
            raise
    except DinorayError as error:
        result.messages.append(str(error))
        raise
    except Exception as error:
        explained = in_words(error, result.store)
        if explained is not error or isinstance(error, OSError | DeltaError):
            result.messages.append(str(explained))
        if explained is error:
            raise
        raise explained from None
    finally:
        result.messages += told
        result.seconds["total"] = time.monotonic() - started
        if result.status == "running":
            result.status = "failed"
        if report is not None:
            with contextlib.suppress(KeyboardInterrupt), interruptible(), uninterrupted():
                _finish(report, result)


def in_words(error: Exception, uri: str) -> Exception:
    """The error of a write, or of storage that does not answer, as a sentence (JobError); any other as it is."""
    if isinstance(error, DinorayError):
        return error
    return explain_write_error(error, uri) or storage.explain_failed_storage(error, uri) or error


def _finish(report: RunReport, result: JobResult) -> None:
    try:
        report.finish(result.status, result=result.as_dict())
    except (OSError, JobError) as error:
        # a full disk must not hide the error that it caused
        if report.optional:
            result.messages.append(f"the run report could not be written ({error}).")


def read_reports(store: str, config: Config, latest: int | None = None) -> list[dict[str, Any]]:
    """The run reports of a store, oldest first; of one that is damaged, only its run_id and that it is unreadable.

    latest: read only this many, the latest.
    """
    fs, path = storage.filesystem(storage.join(store, "runs"), config.storage.options)
    try:
        names = sorted(name.rsplit("/", 1)[-1] for name in fs.ls(path, detail=False) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    reports = []
    for name in names[-latest:] if latest else names:
        try:
            report = storage.read_json(storage.join(store, "runs", name), config.storage.options)
        except JobError:
            report = {"run_id": name.removesuffix(".json"), "status": "unreadable"}
        reports += [report] if report else []
    return reports


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
