"""evaluate parts: the parts of a co-segmentation against part labels or key points, whatever parts are called."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dino_ops.clustering_metrics import Contingency, adjusted_rand_index, normalized_mutual_information
from dino_ops.mask_refinement import resize_mask
from pipelines.errors import RequestError
from pipelines.evaluate.reports import write_report
from pipelines.evaluate.segmentation import about_missing, open_parts, rows_of
from pipelines.evaluate.truth import KeyPoints, TruthFolder, match_names, read_key_points
from pipelines.results.masks import read_png
from pipelines.running.reports import RunReport, new_run_id
from pipelines.settings.sections import Config
from pipelines.store.store import Store

NOT_ANNOTATED_LABEL = 255
BACKGROUND_LABEL = 0
CONVENTIONS = {
    "nmi": "mutual information of part and annotation over the arithmetic mean of their entropies, 0 to 1",
    "ari": "adjusted Rand index: 1 for equal groupings, about 0 for random ones",
    "set": "every set numbers its parts from 0, so each set is counted by itself; `all` is the mean over sets",
}
ITEMS = {
    "pixels": "all pixels that are annotated (255 is not); background is one more part",
    "foreground": "pixels that the annotation gives a part (neither 0 nor 255); what was found as background there is "
    "one more part",
    "keypoints": "visible key points: the part at the point against the name of the point; background is one more part",
}


@dataclass
class Result:
    """How well stored parts agree with annotations.

    kind: labels or keypoints. without_truth: images that have no annotation, which do not count. nmi, ari: means over
    sets, of all pixels or of key points. scores: one row per set and kind of items, `all` for the mean over sets: set,
    items, images, count, nmi, ari.
    """

    run_id: str
    store: str
    name: str
    annotations: str
    kind: str
    images: int
    without_truth: int
    nmi: float
    ari: float
    scores: list[dict[str, Any]]
    conventions: dict[str, str]
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__


@dataclass
class _Counted:
    """What was counted in a set. tables: kind of items -> how often each pair of part and annotation occurs."""

    images: int = 0
    tables: dict[str, Contingency] = field(default_factory=dict)

    def add(self, found: dict[str, Contingency]) -> None:
        self.images += 1
        for items, table in found.items():
            self.tables[items] = self.tables.get(items, Contingency.empty()) + table


def run(config: Config, *, store: str, name: str, annotations: str) -> Result:
    """Compare parts/NAME of a store with a folder of part labels (image files), or of key points.

    Labels are one value a pixel: 0 background, 255 not annotated, others parts. Key points lie as PF-WILLOW or
    SPair-71k have them.

    Raises RequestError without such a co-segmentation or folder, and where no image is annotated.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    tables = open_parts(opened.uri, name, config)
    image_ids = set(tables.images.read(["image_id"])["image_id"].to_pylist())
    points = read_key_points(annotations, config.storage.options)
    labels = TruthFolder(annotations, config.storage.options) if points is None else None
    names = labels.names if labels else sorted(points or ())
    annotated = match_names(image_ids, names)
    if not annotated:
        raise RequestError(
            f"No image of {tables.uri} is annotated in {annotations}: {min(image_ids)} should have an annotation named "
            f"like it, and there is {names[0]}."
        )
    run_id = new_run_id()
    report = RunReport("evaluate parts", opened.uri, config, run_id, {"name": name, "annotations": annotations})

    per_set: dict[str, _Counted] = {}
    point_names: dict[str, int] = {}
    for row in rows_of(tables, ["image_id", "set_id", "mask_png"]):
        if (of_image := annotated.get(row["image_id"])) is None:
            continue
        parts = read_png(row["mask_png"]).astype(np.int64)
        if labels:
            found = _count_labels(parts, labels.read(of_image))
        else:
            found = _count_points(parts, (points or {})[of_image], point_names)
        per_set.setdefault(row["set_id"], _Counted()).add(found)
    kinds = ["pixels", "foreground"] if labels else ["keypoints"]
    scores = _scores(per_set, kinds)
    # The mean over sets follows the sets, and the first kind comes first.
    whole = scores[len(per_set)]
    result = Result(
        run_id=run_id,
        store=opened.uri,
        name=name,
        annotations=annotations,
        kind="labels" if labels else "keypoints",
        images=len(annotated),
        without_truth=len(image_ids) - len(annotated),
        nmi=whole["nmi"],
        ari=whole["ari"],
        scores=scores,
        conventions=CONVENTIONS | {kind: ITEMS[kind] for kind in kinds},
        seconds=round(time.monotonic() - started, 2),
        messages=about_missing(sorted(image_ids - annotated.keys()), annotations),
    )
    result.messages += write_report(report, result.as_dict())
    return result


def _count_labels(parts: np.ndarray, truth: np.ndarray) -> dict[str, Contingency]:
    truth = truth.astype(np.int32)
    if truth.shape != parts.shape:
        truth = resize_mask(truth, *parts.shape)
    counted = truth != NOT_ANNOTATED_LABEL
    inside = counted & (truth != BACKGROUND_LABEL)
    return {
        "pixels": Contingency.of(parts[counted], truth[counted]),
        "foreground": Contingency.of(parts[inside], truth[inside]),
    }


def _count_points(parts: np.ndarray, points: KeyPoints, numbers: dict[str, int]) -> dict[str, Contingency]:
    """Points outside the picture do not count. numbers: of the names of points seen so far."""
    column, row = np.floor(points.xy).astype(np.int64).T
    inside = (column >= 0) & (row >= 0) & (column < parts.shape[1]) & (row < parts.shape[0])
    called = np.array([numbers.setdefault(name, len(numbers)) for name in points.names], np.int64)
    return {"keypoints": Contingency.of(parts[row[inside], column[inside]], called[inside])}


def _scores(per_set: dict[str, _Counted], kinds: list[str]) -> list[dict[str, Any]]:
    scores = []
    for items in kinds:
        found = [(set_id, counted.images, counted.tables[items]) for set_id, counted in sorted(per_set.items())]
        rows = [
            (set_id, images, len(table), normalized_mutual_information(table), adjusted_rand_index(table))
            for set_id, images, table in found
        ]
        _, images, counts, nmi, ari = zip(*rows, strict=True)
        rows.append(("all", sum(images), sum(counts), float(np.mean(nmi)), float(np.mean(ari))))
        scores += [
            {"set": set_id, "items": items, "images": of, "count": count, "nmi": round(n, 6), "ari": round(a, 6)}
            for set_id, of, count, n, a in rows
        ]
    return scores
