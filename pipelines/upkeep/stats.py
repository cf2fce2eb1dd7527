"""stats: a store at a glance, from its logs, its small tables and its run reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from pipelines.results.clusters import ClusterTables
from pipelines.results.matches import MatchTables
from pipelines.results.parts import PartTables
from pipelines.running.reports import read_reports
from pipelines.running.trends import find_trends, moved_lately
from pipelines.settings.sections import Config
from pipelines.store.store import Store
from pipelines.store.table import Table


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
    clusters: dict[str, dict[str, int]] = field(default_factory=dict)  # NAME -> see _count_clusters
    parts: dict[str, dict[str, int]] = field(default_factory=dict)  # NAME -> see _count_parts
    runs: list[dict[str, Any]] = field(default_factory=list)
    trends: list[dict[str, Any]] = field(default_factory=list)  # see pipelines.running.trends.Trend
    moved: list[str] = field(default_factory=list)  # what changed by much in the last run of each job

    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__


def run(config: Config, *, store: str) -> Result:
    """Look at a store. Reads the logs, the failures, a column or two of images, pairs and parts; no patches."""
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
    options = opened.config.storage.options
    matches, clusters = MatchTables.all_in(opened.uri, options), ClusterTables.all_in(opened.uri, options)
    result.matches = {name: _count_matches(tables) for name, tables in matches.items()}
    result.clusters = {name: _count_clusters(tables) for name, tables in clusters.items()}
    result.parts = {name: _count_parts(two) for name, two in PartTables.all_in(opened.uri, options).items()}
    reports = read_reports(opened.uri, opened.config)
    for report in reports:
        done = report["result"] if isinstance(report.get("result"), dict) else {}
        shown = {key: report.get(key) for key in ("run_id", "command", "status", "started_at", "finished_at")}
        counts = ("extracted", "failed", "pruned", "images_per_second", "bytes_written", "device")
        result.runs.append(shown | {key: done.get(key) for key in counts})
    trends = find_trends(reports)
    result.trends, result.moved = [trend.as_dict() for trend in trends], moved_lately(trends)
    return result


def _count_matches(tables: MatchTables) -> dict[str, int]:
    """Of matches/NAME: pairs, matches (rows that were kept), pairs without any, files and bytes of both tables."""
    kept = tables.pairs.read(["kept"])["kept"]
    counts = {"pairs": len(kept), "matches": pc.sum(kept).as_py() or 0}
    counts["without_matches"] = pc.sum(pc.equal(kept, 0)).as_py() or 0
    return counts | _sizes(tables.pairs, tables.matches)


def _count_clusters(tables: ClusterTables) -> dict[str, int]:
    """Of clusters/NAME: clusters, assignments, files and bytes of both tables."""
    counts = {"clusters": _rows(tables.centroids), "assignments": _rows(tables.assignments)}
    return counts | _sizes(tables.centroids, tables.assignments)


def _count_parts(tables: PartTables) -> dict[str, int]:
    """Of parts/NAME: sets, images (of all sets), those without any foreground, files and bytes of both tables."""
    rows = tables.images.read(["set_id", "foreground_fraction"])
    empty = pc.sum(pc.equal(rows["foreground_fraction"], 0)).as_py() or 0
    counts = {"sets": len(pc.unique(rows["set_id"])), "images": len(rows), "without_foreground": empty}
    return counts | _sizes(tables.images, tables.patches)


def _rows(table: Table) -> int:
    return sum(file.rows for file in table.files().values())


def _sizes(*tables: Table) -> dict[str, int]:
    files = [file for table in tables for file in table.files().values()]
    return {"files": len(files), "bytes": sum(file.size for file in files)}
