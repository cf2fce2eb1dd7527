"""stats: a store at a glance, from its logs, its small tables and its run reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import Config
from pipelines.runs import read_reports
from pipelines.store import Store


@dataclass
class Result:
    """Counts and sizes of a store."""

    store: str
    spec: dict[str, Any]
    fingerprint: str
    images: int = 0
    patches: int = 0
    failures: int = 0
    labels: int = 0
    files: dict[str, int] = field(default_factory=dict)  # per table
    bytes: dict[str, int] = field(default_factory=dict)  # per table, as committed
    bytes_per_image: float | None = None
    failures_by_reason: dict[str, int] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__


def run(config: Config, *, store: str) -> Result:
    """Look at a store. Reads the logs, two columns of images and the failures; no patches."""
    opened = Store.open(store, config)
    result = Result(opened.uri, opened.spec, opened.fingerprint)
    for name, table in (("images", opened.images), ("patches", opened.patches), ("failures", opened.failures)):
        files = table.files().values()
        result.files[name] = len(files)
        result.bytes[name] = sum(file.size for file in files)
        setattr(result, name, sum(file.rows for file in files))
    if result.images:
        result.bytes_per_image = round(sum(result.bytes.values()) / result.images, 1)
    result.labels = len(set(opened.images.read(["label"])["label"].to_pylist()) - {None})
    failed = opened.failures.read(["stage", "error"]).to_pylist()
    result.failures_by_reason = dict(Counter(f"{row['stage']}: {row['error']}" for row in failed).most_common())
    for report in read_reports(opened.uri, opened.config):
        done = report.get("result", {})
        shown = {key: report.get(key) for key in ("run_id", "command", "status", "started_at", "finished_at")}
        counts = ("extracted", "failed", "pruned", "images_per_second", "bytes_written", "device")
        result.runs.append(shown | {key: done.get(key) for key in counts})
    return result
