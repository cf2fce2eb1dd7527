"""stats: a store at a glance, from its logs, its small tables and its run reports."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipelines.results.all_kinds import KINDS, look_at_results
from pipelines.running.reports import JobResult, new_run_id, read_reports, recorded
from pipelines.running.trends import find_trends, moved_lately
from pipelines.settings.sections import Config
from pipelines.store.damage import DamagedLog, DamagedResult
from pipelines.store.parquet import DamagedFile, MissingFile
from pipelines.store.store import Store


@dataclass
class Result(JobResult):
    """Counts and sizes of a store.

    files, bytes: by table, as committed. results: by kind and NAME, what each holds; in plain data the kinds stand
    beside the other counts. described: the same in words, by KIND/NAME. trends: see pipelines.running.trends.Trend.
    moved: what changed by much in the last run of each job.
    """

    spec: dict[str, Any]
    fingerprint: str
    images: int = 0
    patches: int = 0
    failures: int = 0
    labels: int = 0
    files: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    bytes_per_image: float | None = None
    failures_by_reason: dict[str, int] = field(default_factory=dict)
    results: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    described: dict[str, str] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    trends: list[dict[str, Any]] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        content = super().as_dict()
        del content["described"]
        return content | content.pop("results")


def run(config: Config, *, store: str) -> Result:
    """Look at a store. Reads the logs, the failures, a column or two of images, pairs and parts; no patches."""
    started = time.monotonic()
    opened = Store.open(store, config)
    result = Result(new_run_id(), opened.uri, opened.spec, opened.fingerprint)
    with recorded(None, result, started):
        _count_extraction(opened, result)
        result.results |= {kind: {} for kind in KINDS}
        for path, one in look_at_results(opened):
            try:
                if isinstance(one, DamagedLog):
                    raise one
                counts = one.counts()
            except (DamagedLog, DamagedFile, DamagedResult, MissingFile) as error:
                result.messages.append(f"{path} is left out: {error}")
                continue
            result.results[one.kind][one.name] = counts
            result.described[path] = one.describe(counts)
        reports = read_reports(opened.uri, opened.config)
        result.runs = [_about(report) for report in reports]
        trends = find_trends(reports)
        result.trends, result.moved = [trend.as_dict() for trend in trends], moved_lately(trends)
    return result


def _count_extraction(store: Store, result: Result) -> None:
    for name, table in (("images", store.images), ("patches", store.patches), ("failures", store.failures)):
        files = table.files().values()
        result.files[name] = len(files)
        result.bytes[name] = sum(file.size for file in files)
        setattr(result, name, sum(file.rows for file in files))
    if result.images:
        result.bytes_per_image = round(sum(result.bytes.values()) / result.images, 1)
    result.labels = len(set(store.images.read(["label"])["label"].to_pylist()) - {None})
    failed = store.failures.read(["stage", "error"]).to_pylist()
    result.failures_by_reason = dict(Counter(f"{row['stage']}: {row['error']}" for row in failed).most_common())


def _about(report: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a run."""
    done = report["result"] if isinstance(report.get("result"), dict) else {}
    shown = {key: report.get(key) for key in ("run_id", "command", "status", "started_at", "finished_at")}
    counts = ("extracted", "failed", "pruned", "images_per_second", "bytes_written", "device")
    return shown | {key: done.get(key) for key in counts}
