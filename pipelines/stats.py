"""stats: a store at a glance, from its logs, its small tables and its run reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from pipelines.config import Config
from pipelines.match_tables import MatchTables
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
    matches: dict[str, dict[str, int]] = field(default_factory=dict)  # NAME -> see _count_matches
    runs: list[dict[str, Any]] = field(default_factory=list)

    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__


def run(config: Config, *, store: str) -> Result:
    """Look at a store. Reads the logs, the failures, a column of images and of pairs; no patches."""
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
    names = MatchTables.all_in(opened.uri, opened.config.storage.options)
    result.matches = {name: _count_matches(tables) for name, tables in names.items()}
    for report in read_reports(opened.uri, opened.config):
        done = report.get("result", {})
        shown = {key: report.get(key) for key in ("run_id", "command", "status", "started_at", "finished_at")}
        counts = ("extracted", "failed", "pruned", "images_per_second", "bytes_written", "device")
        result.runs.append(shown | {key: done.get(key) for key in counts})
    return result


def _count_matches(tables: MatchTables) -> dict[str, int]:
    """Of matches/NAME: pairs, matches (rows that were kept), pairs without any, files and bytes of both tables."""
    kept = tables.pairs.read(["kept"])["kept"]
    files = [*tables.pairs.files().values(), *tables.matches.files().values()]
    return {
        "pairs": len(kept),
        "matches": pc.sum(kept).as_py() or 0,
        "without_matches": pc.sum(pc.equal(kept, 0)).as_py() or 0,
        "files": len(files),
        "bytes": sum(file.size for file in files),
    }
