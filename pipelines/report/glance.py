"""The dataset at a glance: what a store holds, what failed and why, and how fast past runs were."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
from rich.filesize import decimal

from pipelines.running.reports import read_reports
from pipelines.settings.sections import Config
from pipelines.store.rows import MOST_SAMPLED_FILES, MOST_SAMPLED_ROWS_PER_FILE, row_count, some_rows
from pipelines.store.store import Store

LATEST_RUNS_SHOWN = 12
MAX_LABELS_SHOWN, MAX_REASONS_SHOWN = 12, 12


@dataclass
class Run:
    """A past run as the page shows it. per_second: images (or pairs)."""

    when: str
    command: str
    status: str
    done: int | None
    failed: int | None
    per_second: float | None
    seconds: float | None
    device: str


@dataclass
class Glance:
    """Counts and sizes of a store.

    labels: most images first. labels_from: how many images' labels were looked at. widths, heights: the smallest, the
    median and the largest. failures: stage, error class, message of one, count.
    """

    images: int
    patches: int
    failed: int
    size: str
    bytes_per_image: str
    model: str
    settings: list[tuple[str, str]]
    labels: list[tuple[str, int]] = field(default_factory=list)
    label_count: int = 0
    labels_from: int = 0
    widths: tuple[int, int, int] | None = None
    heights: tuple[int, int, int] | None = None
    failures: list[tuple[str, str, str, int]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def fastest(self) -> float:
        return max((run.per_second or 0 for run in self.runs), default=0)


def glance(store: Store, config: Config) -> Glance:
    """Reads logs, a sample of images, the failures and the latest run reports; no patches."""
    files = [file for table in (store.images, store.patches, store.failures) for file in table.files().values()]
    images, size = row_count(store.images), sum(file.size for file in files)
    spec = store.spec
    found = Glance(
        images=images,
        patches=row_count(store.patches),
        failed=row_count(store.failures),
        size=decimal(size),
        bytes_per_image=decimal(round(size / images)) if images else "",
        model=spec["model"]["name"],
        settings=_settings(spec),
    )
    rows = some_rows(store.images, ["label", "width", "height"], config.report.seed)
    labels = Counter(label for label in rows["label"].to_pylist() if label is not None)
    found.labels, found.label_count = labels.most_common(MAX_LABELS_SHOWN), len(labels)
    found.labels_from = len(rows)
    if len(rows):
        found.widths, found.heights = (_spread(rows[name]) for name in ("width", "height"))
    failed = Counter[tuple[str, str]]()
    messages: dict[tuple[str, str], str] = {}
    for path in sorted(store.failures.files())[:MOST_SAMPLED_FILES]:
        columns = store.failures.read_file(path, ["stage", "error", "message"]).to_pydict()
        for stage, error, message in zip(columns["stage"], columns["error"], columns["message"], strict=True):
            failed[stage, error] += 1
            messages.setdefault((stage, error), message or "")
    found.failures = [(*reason, messages[reason], count) for reason, count in failed.most_common(MAX_REASONS_SHOWN)]
    found.runs = [_run(report) for report in read_reports(store.uri, store.config, latest=LATEST_RUNS_SHOWN)][::-1]
    return found


def looked_at_all(found: Glance) -> bool:
    """Whether labels and sizes are those of all images, and not of a sample."""
    return found.labels_from == found.images or found.images <= min(MOST_SAMPLED_FILES, MOST_SAMPLED_ROWS_PER_FILE)


def _spread(values: Any) -> tuple[int, int, int]:
    low, middle, high = pc.quantile(values, [0.0, 0.5, 1.0], interpolation="nearest").to_pylist()
    return int(low), int(middle), int(high)


def _settings(spec: dict[str, Any]) -> list[tuple[str, str]]:
    image, features = spec["image"], spec["features"]
    size = "x".join(map(str, image["size"])) if image.get("size") else image.get("shorter_side")
    said = f"{size} pixels" if image.get("size") else f"shorter side {size} pixels" if size else "as in the file"
    return [
        ("model", spec["model"]["name"]),
        ("photos resized to", said),
        ("descriptors", f"{features['facet']} of layer {features['layer']}"),
        ("one patch every", f"{features['stride']} pixels" if features.get("stride") else "patch size of the model"),
    ]


def _run(report: dict[str, Any]) -> Run:
    result = report.get("result") or {}
    seconds = result.get("seconds")
    rate = result.get("images_per_second") or result.get("pairs_per_second")
    counts: tuple[str, ...] = ("extracted", "segmented", "matched", "added", "vectors")
    if result.get("what") == "train":  # training clusters adds no images to older ones
        counts = ("vectors",)
    return Run(
        when=_when(report.get("started_at")),
        command=str(report.get("command", "")),
        status=str(report.get("status", "")),
        done=next((result[name] for name in counts if isinstance(result.get(name), int)), None),
        failed=result.get("failed") if isinstance(result.get("failed"), int) else None,
        per_second=float(rate) if isinstance(rate, int | float) else None,
        seconds=seconds.get("total") if isinstance(seconds, dict) else seconds if isinstance(seconds, float) else None,
        device=str(result.get("device") or ""),
    )


def _when(text: Any) -> str:
    try:
        return f"{dt.datetime.fromisoformat(text).astimezone(dt.UTC):%Y-%m-%d %H:%M}"
    except (TypeError, ValueError):
        return ""
