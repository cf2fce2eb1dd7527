"""How a store's runs compare with the ones before: speed, failures, size, duration, and what moved by much.

A run is compared with earlier ones of the same command (and result's name) on the same device that did about as much:
starting workers takes most of a run of ten images, and next to nothing of a run of a million.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.jobs import JOBS, PIPELINE_COMMAND

MOST_PEER_RUNS = 10
FEWEST_PEER_RUNS = 3
# Runs that did between a quarter and four times as much are of about the same size.
SIMILAR_WORK_RATIO = 4.0
MUCH_OF_MEDIAN = 0.25
# Durations vary with the machine and its neighbours.
MUCH_LONGER_OF_MEDIAN = 0.5
MUCH_FAILED_FRACTION = 0.01
MUCH_FAILED_RATIO = 2


@dataclass(frozen=True)
class Trend:
    """A run that ended well and did something, and how it compares.

    Values that a command does not have are None.

    job: the command, and the name of its result where it has one. per_second: images or pairs (see `of`).
    failed_fraction: 0..1. seconds: of the whole run. change: by value, the difference from the median of `peers`
    earlier runs as a fraction of it; for failed_fraction the plain difference. moved: a sentence for each value that
    changed by much.
    """

    run_id: str
    job: str
    device: str
    started_at: str
    work: float | None = None
    of: str = ""
    per_second: float | None = None
    failed_fraction: float | None = None
    bytes_per_image: float | None = None
    seconds: float | None = None
    peers: int = 0
    change: dict[str, float] = field(default_factory=dict)
    moved: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"moved": list(self.moved)}


def find_trends(reports: Sequence[dict[str, Any]]) -> list[Trend]:
    """Run reports, oldest first, to the runs that did something, each compared with those before it.

    Left out: runs that failed, were interrupted or had nothing to do, pipelines (their jobs have reports of their own),
    and reports that are damaged.
    """
    trends: list[Trend] = []
    for report in reports:
        measured = _measure(report)
        if measured is not None:
            trends.append(
                _compare(measured, [before for before in trends if _comparable(before, measured)][-MOST_PEER_RUNS:])
            )
    return trends


def moved_lately(trends: Sequence[Trend]) -> list[str]:
    """What moved by much in the last run of each job and device."""
    last = {(trend.job, trend.device): trend for trend in trends}
    return [sentence for trend in last.values() for sentence in trend.moved]


def _measure(report: dict[str, Any]) -> Trend | None:
    command, result = report.get("command"), report.get("result")
    if report.get("status") != "done" or not isinstance(command, str) or not isinstance(result, dict):
        return None
    if command == PIPELINE_COMMAND or result.get("status", "done") != "done":
        return None
    count_keys, of = (JOBS[command].counts, JOBS[command].unit) if command in JOBS else ((), "")
    counts = [_number(result.get(key)) or 0.0 for key in count_keys]
    work = sum(counts) if count_keys else None
    seconds = result.get("seconds")
    took = _number(seconds.get("total") if isinstance(seconds, dict) else seconds)
    if work == 0 or took is None:
        return None
    asked = report.get("asked")
    name = asked.get("name") if isinstance(asked, dict) else None
    failed_fraction = bytes_per_image = None
    if work and "failed" in count_keys:
        failed = counts[count_keys.index("failed")]
        done = work - failed
        written = _number(result.get("bytes_written"))
        failed_fraction = failed / work
        bytes_per_image = written / done if written is not None and done else None
    # a rate of 0 says that nothing was measured
    return Trend(
        run_id=str(report.get("run_id", "")),
        job=f"{command} {name}" if isinstance(name, str) else command,
        device=str(result.get("device") or ""),
        started_at=str(report.get("started_at") or ""),
        work=work,
        of=of,
        per_second=_number(result.get(f"{of}_per_second")) or None,
        failed_fraction=failed_fraction,
        bytes_per_image=bytes_per_image,
        seconds=took,
    )


def _comparable(before: Trend, now: Trend) -> bool:
    if (before.job, before.device) != (now.job, now.device):
        return False
    return not before.work or not now.work or 1 / SIMILAR_WORK_RATIO <= before.work / now.work <= SIMILAR_WORK_RATIO


def _compare(now: Trend, before: Sequence[Trend]) -> Trend:
    medians = {
        key: statistics.median(values)
        for key in ("per_second", "failed_fraction", "bytes_per_image", "seconds")
        if getattr(now, key) is not None and (values := [v for one in before if (v := getattr(one, key)) is not None])
    }
    change = {}
    for key, median in medians.items():
        if key == "failed_fraction":
            change[key] = getattr(now, key) - median
        elif median > 0:
            change[key] = getattr(now, key) / median - 1
    moved = _sentences(now, change, medians, len(before)) if len(before) >= FEWEST_PEER_RUNS else []
    return Trend(**now.__dict__ | {"peers": len(before), "change": change, "moved": tuple(moved)})


def _sentences(now: Trend, change: dict[str, float], medians: dict[str, float], peers: int) -> list[str]:
    than = f"than the median of the {peers} runs before"
    found = []
    faster = change.get("per_second", 0.0)
    if abs(faster) >= MUCH_OF_MEDIAN:
        found.append(f"{now.job}: {abs(faster):.0%} {'faster' if faster > 0 else 'slower'} {than}")
    longer = change.get("seconds", 0.0)
    if now.per_second is None and abs(longer) >= MUCH_LONGER_OF_MEDIAN:
        found.append(f"{now.job}: took {abs(longer):.0%} {'longer' if longer > 0 else 'less time'} {than}")
    failing = change.get("failed_fraction", 0.0)
    if abs(failing) >= MUCH_FAILED_FRACTION:
        usual, share = medians["failed_fraction"], now.failed_fraction or 0.0
        if max(usual, share) >= MUCH_FAILED_RATIO * min(usual, share):
            found.append(f"{now.job}: failures {usual:.1%} -> {share:.1%}")
    larger = change.get("bytes_per_image", 0.0)
    if abs(larger) >= MUCH_OF_MEDIAN:
        found.append(f"{now.job}: {abs(larger):.0%} {'more' if larger > 0 else 'fewer'} bytes an image {than}")
    return [sentence.replace("%", " %") for sentence in found]


def _number(value: Any) -> float | None:
    """A count or measure of a report, which anybody may have written; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)
