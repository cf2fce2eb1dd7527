"""extract: images become rows of `images` and `patches`, or of `failures`.

    listing -> what is left -> Ray Data: fetch, decode, model, write shards -> the driver commits them

Every pending image is accounted for by its position. What a dead worker or a failed write leaves undone is tried again
in smaller blocks, at last one image at a time, so that an image that kills its worker ends as a row in `failures` and
takes no other image with it.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import sources, storage
from pipelines.errors import RequestError, counted
from pipelines.running.commits import WaitingReports
from pipelines.running.interrupts import interruptible
from pipelines.running.metrics import JobMetrics
from pipelines.running.progress import ProgressLine
from pipelines.running.ray_session import ray_session
from pipelines.running.reports import IncrementalResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.storage.errors import explain_write_error
from pipelines.store.extraction import Committer, Plan, ShardReport, drop_images
from pipelines.store.failures import STORAGE_ERROR, failure_row
from pipelines.store.projection import write_projections
from pipelines.store.store import Store, refuse_memory

if TYPE_CHECKING:
    from dino_ops.pca import PCA
    from pipelines.extract.layout import ModelFacts


IMAGES_TRIED_AFTER_WORKER_DEATH = 8


@dataclass
class Result(IncrementalResult):
    """What a run of extract did, or would do.

    listed: images of INPUT. skipped: files that are not images by name. failed_before: images recorded in failures,
    which --retry-failed tries again. changed: pending images that replace older rows. images_per_second: from the start
    of Ray to the last image; steady_images_per_second: once workers are warm.
    """

    listed: int = 0
    skipped: int = 0
    failed_before: int = 0
    extracted: int = 0
    failed: int = 0
    changed: int = 0
    pruned: int = 0
    failures_by_reason: dict[str, int] = field(default_factory=dict)
    images_per_second: float = 0.0
    steady_images_per_second: float = 0.0
    device: str = ""


def run(
    config: Config,
    *,
    input: str,
    store: str,
    prune: bool = False,
    retry_failed: bool = False,
    limit: int | None = None,
    dry_run: bool = False,
) -> Result:
    """Extract the images of `input` into `store`; a second call does only what is new or changed.

    Args:
        input: directory, prefix, glob, tar, manifest or Parquet dataset; see pipelines.sources.
        prune: remove rows of images that are no longer in `input`.
        retry_failed: try again the images recorded in `failures`.
        limit: extract at most this many of the images that are left.
        dry_run: list and plan only; nothing is written.

    Raises:
        RequestError, sources.InputError, dino_ops.errors.ModelError: the request was wrong.
        JobError: the job failed; what was committed stays.
    """
    started = time.monotonic()
    refuse_memory(input, "INPUT")
    result = Result(run_id=new_run_id(), store=storage.normalise(store))
    if storage.normalise(input) == result.store:
        raise RequestError(f"STORE is {store}, which is INPUT itself: give another place for the tables.")
    listing = sources.list_images(input, storage_options=config.storage.options, exclude=result.store)
    result.listed = len(listing.table)
    result.skipped = sum(listing.skipped.values())
    result.seconds["list"] = time.monotonic() - started
    if listing.skipped:
        result.messages.append(_skipped_sentence(listing.skipped))

    if dry_run:
        opened = Store.open_existing(result.store, config)
        plan = (opened.plan if opened else Plan.of_empty_store)(listing.table, retry_failed=retry_failed, limit=limit)
        _count_plan(result, plan)
        return result.ended("dry_run", started)

    opened = Store.open_existing(result.store, config)
    with contextlib.ExitStack() as session:
        facts = None
        if opened is None:
            # what cannot be done is refused before there is a store, which would be bound to a mistake
            facts = _check_model(config)
            pending = Plan.of_empty_store(listing.table, limit=limit).pending
            fitted = _rehearse(session, pending, config, facts, result.run_id) if len(pending) else {}
            opened = Store.create(result.store, config)
            if fitted:
                write_projections(opened.uri, config, fitted)
        opened.make_tables()
        opened.complete()
        asked = {"input": input, "prune": prune, "retry_failed": retry_failed, "limit": limit}
        report = RunReport("extract", result.store, config, result.run_id, asked)
        with recorded(report, result, started, told=opened.log.messages, fingerprint=opened.fingerprint):
            result.repaired = {what: count for what, count in opened.repair(result.run_id).items() if count}
            plan = opened.plan(listing.table, retry_failed=retry_failed, limit=limit)
            _count_plan(result, plan)
            if prune and listing.broken:
                result.messages.append("Nothing was pruned: what a damaged file held and what is gone look the same.")
            elif prune and plan.gone:
                result.pruned = drop_images(opened, plan.gone, result.run_id)
            if len(plan.pending):
                extract_pending(opened, plan, config, result, facts or _check_model(config))
            _record_damage(opened, listing, result)
            _judge(result, config)
    return result


def _rehearse(
    session: contextlib.ExitStack, pending: pa.Table, config: Config, facts: ModelFacts, run_id: str
) -> dict[str, PCA]:
    """Start Ray, plan the workers, and fit the PCA where one is asked for; by descriptor column.

    session: Ray stays until it ends.

    Raises RequestError and JobError for what the cluster or the images cannot meet.
    """
    from pipelines.extract.layout import plan_extraction
    from pipelines.extract.streaming import fit_projections

    resources = session.enter_context(ray_session(config.run))
    layout = plan_extraction(resources, config, facts, len(pending))
    return fit_projections(pending, layout, config, run_id) if config.store.pca is not None else {}


def extract_pending(
    store: Store, plan: Plan, config: Config, result: Result, facts: ModelFacts, command: str = "extract"
) -> None:
    """Extract and commit every pending image, in passes over what is still undone. command: its name in metrics."""
    # Ray and torch are needed from here on
    from pipelines.extract.layout import plan_extraction
    from pipelines.extract.streaming import stream_reports

    with ray_session(config.run) as resources, interruptible(), ProgressLine(len(plan.pending)) as progress:
        work = PendingWork(store, plan, config, result, JobMetrics(command))
        layout = plan_extraction(resources, config, facts, len(plan.pending))
        try:
            for block_size in _block_sizes(config.run.attempts, layout.block_size):
                undone = work.undone()
                if not len(undone):
                    break
                progress.restart(result.extracted + result.done_elsewhere, result.failed)
                work.attempt += 1
                reports = stream_reports(
                    undone, block_size, layout, store, config, result.run_id, apart=work.attempt > 1
                )
                # closed while Ray is there
                with contextlib.closing(reports):
                    for shard_report in reports:
                        progress.advance(shard_report.done, shard_report.failed)
                        work.take(shard_report)
                work.commit()
            work.give_up()
        finally:
            # an interruption keeps what is finished
            work.commit()
            result.steady_images_per_second = round(progress.steady_images_per_second, 2)
            result.images_per_second = round(progress.mean_images_per_second, 2)


class PendingWork:
    """Which pending images are settled, and the reports that wait for the next commit."""

    def __init__(
        self, store: Store, plan: Plan, config: Config, result: Result, metrics: JobMetrics | None = None
    ) -> None:
        self._metrics = metrics
        self.pending = plan.pending
        self.settled = np.zeros(len(plan.pending), bool)
        self.attempt = 0
        self._committer = Committer(store, result.run_id, plan.changed, plan.seen)
        self._result = result
        self._store = store
        self._waiting = WaitingReports(config.run.commit_seconds, self._commit, result, metrics)
        self._last_error_at: dict[int, dict[str, Any]] = {}

    def undone(self) -> pa.Table:
        return self.pending.filter(pa.array(~self.settled))

    def take(self, report: ShardReport) -> None:
        """Count a report; commit when what waits has waited long enough.

        Raises JobError for a write error that trying again cannot mend: a full disk, a lost permission.
        """
        result = self._result
        self._waiting.spent(report.seconds)
        result.bytes_read += report.bytes_read
        if self._metrics:
            self._metrics.read(report.bytes_read)
        result.device = result.device or report.device
        if report.error:
            self._note_error(report)
        # A Ray that ran a task twice must not make rows twice.
        report.failures = [failure for failure in report.failures if not self.settled[failure["position"]]]
        if self.settled[report.positions].any():
            report.images = None
        if report.images or report.failures:
            self.settled[[failure["position"] for failure in report.failures]] = True
            if report.images:
                self.settled[report.positions] = True
            self._waiting.add(report)
        self._waiting.commit_when_due()

    def commit(self) -> None:
        """Commit what waits; an interruption comes after it."""
        self._waiting.commit()

    def _commit(self, reports: list[ShardReport]) -> None:
        positions = [p for report in reports for p in report.positions]
        positions += [failure["position"] for report in reports for failure in report.failures]
        rows = self.pending.take(pa.array(positions, pa.int64())).to_pylist()
        versions = {row["image_id"]: (row["source_size"], row["source_version"]) for row in rows}
        outcome = self._committer.commit(reports, versions)
        result = self._result
        result.extracted += outcome.extracted
        result.failed += outcome.failed
        result.done_elsewhere += outcome.done_elsewhere
        written = sum(report.bytes_written for report in reports)
        result.bytes_written += written
        failures = Counter((f["stage"], f["error"]) for report in reports for f in report.failures)
        reasons = Counter({f"{stage}: {error}": count for (stage, error), count in failures.items()})
        result.failures_by_reason = dict(Counter(result.failures_by_reason) + reasons)
        if self._metrics:
            self._metrics.committed(outcome.extracted, written, failures)

    def give_up(self) -> None:
        """Record what no attempt could finish as failures."""
        left = []
        for row in self.undone().to_pylist():
            error = self._last_error_at.get(row["position"]) or {
                "stage": "extract",
                "error": "WorkerDied",
                "message": "the worker process died while it worked on this image (out of memory, or a crash in "
                "native code)",
            }
            message = error["message"] or error["error"]
            left.append(failure_row(row, error["stage"], error["error"], message, self.attempt, self._result.run_id))
        if left:
            self.take(ShardReport("progress", failures=left))

    def _note_error(self, report: ShardReport) -> None:
        assert report.error is not None
        if report.error["stage"] == "write":
            original = OSError(report.error["errno"], report.error["message"])
            if explained := explain_write_error(original, self._store.uri):
                self.commit()
                raise explained
        self._last_error_at |= dict.fromkeys(report.positions, report.error)
        report.positions = []


def _block_sizes(attempts: int, first: int) -> list[int]:
    """Images a block in each attempt: as planned, then few, at last one, so that no image fails for a neighbour."""
    return [first] if attempts == 1 else [first, *[min(first, IMAGES_TRIED_AFTER_WORKER_DEATH)] * (attempts - 2), 1]


def _check_model(config: Config) -> ModelFacts:
    """Build the model once on this machine's CPU, so that a mistake is a sentence before any worker starts.

    Raises dino_ops.errors.ModelError.
    """
    from pipelines.extract.layout import model_facts

    return model_facts(config)


def _count_plan(result: Result, plan: Plan) -> None:
    result.already_done = plan.done
    result.failed_before = plan.failed_before
    result.pending = len(plan.pending)
    result.changed = len(plan.changed)


def _record_damage(store: Store, listing: sources.Listing, result: Result) -> None:
    """A damaged tar or Parquet file is a failures row of its own, and the run says so with exit code 1.

    The row is removed once the file is replaced or removed.
    """
    broken = {container.image_id for container in listing.broken}
    recorded = pa.array(sorted(store.failed_in_listing() - broken), pa.string())
    mended = recorded.filter(pc.invert(pc.is_in(recorded, value_set=listing.table["image_id"])))
    if len(mended):
        drop_images(store, mended.to_pylist(), result.run_id, tables=("failures",))
    if not broken:
        return
    rows = []
    for container in listing.broken:
        source = {
            "position": 0,
            "image_id": container.image_id,
            "uri": container.uri,
            "source_version": container.source_version,
        }
        rows.append(failure_row(source, "list", container.error, container.message, 1, result.run_id))
        result.messages.append(
            f"{container.uri} is damaged ({container.message}): what could be read of it is extracted; replace the "
            "file and run the same command again."
        )
    report = ShardReport("progress", failures=rows)
    Committer(store, result.run_id, set()).commit([report], {row["image_id"]: (-1, "") for row in rows})
    result.exit_code = 1


def _judge(result: Result, config: Config) -> None:
    if kept := sum(count for why, count in result.failures_by_reason.items() if why.endswith(f": {STORAGE_ERROR}")):
        result.messages.append(
            f"{counted(kept, 'image')} could not be fetched or stored because the storage failed: the same command "
            f"tries {'it' if kept == 1 else 'them'} again."
        )
    tried = result.extracted + result.failed
    if result.exit_code == 0 and tried and result.failed / tried > config.run.max_failed_fraction:
        result.exit_code = 3
        result.messages.append(
            f"{result.failed:,} of {counted(tried, 'image')} failed, more than run.max_failed_fraction "
            f"{config.run.max_failed_fraction} allows: see the failures table for the reasons."
        )


def _skipped_sentence(skipped: dict[str, int]) -> str:
    most = sorted(skipped.items(), key=lambda item: -item[1])[:5]
    kinds = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in most)
    count = sum(skipped.values())
    reason = "it is not an image by name" if count == 1 else "they are not images by name"
    return f"{counted(count, 'file')} skipped because {reason} ({kinds})."
