"""evaluate segmentation: the foreground of a co-segmentation against annotated masks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from dino_ops.mask_refinement import resize_mask
from dino_ops.segmentation_metrics import jaccard, localised, pixel_precision
from pipelines.errors import RequestError, counted
from pipelines.evaluate.reports import write_report
from pipelines.evaluate.truth import TruthFolder, match_names
from pipelines.results.masks import read_png
from pipelines.results.parts import PartTables
from pipelines.running.reports import RunReport, new_run_id
from pipelines.settings.sections import Config
from pipelines.store.parquet import open_parquet
from pipelines.store.store import Store

MASK_FOREGROUND_ABOVE = 127
ROWS_AT_ONCE = 64
MAX_NAMES_SHOWN = 3
MEASURES = ("jaccard", "precision", "corloc")
CONVENTIONS = {
    "jaccard": "intersection over union of the foregrounds of an image, mean over images; 1 where both are empty",
    "precision": "fraction of all pixels of an image labelled right, background included, mean over images",
    "corloc": "fraction of images where the box around the largest connected component of the foreground has an "
    "intersection over union of at least 0.5 with that around any component of the annotated mask",
}


@dataclass
class Result:
    """How well stored foregrounds agree with annotated ones, pixel by pixel of the original images.

    without_truth: images of the co-segmentation that have no annotated mask, which do not count. resized: annotated
    masks of another size than their image. jaccard, precision, corloc: of all images. scores: one row per set, and
    `all` for all images: set, images, jaccard, precision, corloc.
    """

    run_id: str
    store: str
    name: str
    masks: str
    images: int
    without_truth: int
    resized: int
    jaccard: float
    precision: float
    corloc: float
    scores: list[dict[str, Any]]
    conventions: dict[str, str] = field(default_factory=lambda: dict(CONVENTIONS))
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__


def run(config: Config, *, store: str, name: str, masks: str) -> Result:
    """Compare parts/NAME of a store with a folder of annotated masks, whose values above 127 are foreground.

    Raises RequestError without such a co-segmentation or folder, and where no image has an annotated mask.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    tables = open_parts(opened.uri, name, config)
    truth = TruthFolder(masks, config.storage.options)
    image_ids = set(tables.images.read(["image_id"])["image_id"].to_pylist())
    annotated = match_names(image_ids, truth.names)
    if not annotated:
        raise RequestError(
            f"No image of {tables.uri} has a mask in {masks}: {min(image_ids)} should have one named like it, and "
            f"there is {truth.names[0]}."
        )
    run_id = new_run_id()
    report = RunReport("evaluate segmentation", opened.uri, config, run_id, {"name": name, "masks": masks})

    per_set: dict[str, list[tuple[float, float, bool]]] = {}
    resized = set()
    for row in rows_of(tables, ["image_id", "set_id", "foreground_png"]):
        if row["image_id"] not in annotated:
            continue
        true = truth.read(annotated[row["image_id"]]) > MASK_FOREGROUND_ABOVE
        found = read_png(row["foreground_png"]) > 0
        if found.shape != true.shape:
            resized.add(row["image_id"])
            true = resize_mask(true, *found.shape)
        per_set.setdefault(row["set_id"], []).append(
            (jaccard(found, true), pixel_precision(found, true), localised(found, component_boxes(true)))
        )
    groups = [*sorted(per_set.items()), ("all", [one for of_set in per_set.values() for one in of_set])]
    scores: list[dict[str, Any]] = []
    for set_id, values in groups:
        means = np.mean(np.array(values, np.float64), axis=0)
        named = {measure: round(float(mean), 6) for measure, mean in zip(MEASURES, means, strict=True)}
        scores.append({"set": set_id, "images": len(values), **named})
    result = Result(
        run_id=run_id,
        store=opened.uri,
        name=name,
        masks=masks,
        images=len(annotated),
        without_truth=len(image_ids) - len(annotated),
        resized=len(resized),
        jaccard=scores[-1]["jaccard"],
        precision=scores[-1]["precision"],
        corloc=scores[-1]["corloc"],
        scores=scores,
        seconds=round(time.monotonic() - started, 2),
        messages=about_missing(sorted(image_ids - annotated.keys()), masks),
    )
    result.messages += write_report(report, result.as_dict())
    return result


def component_boxes(mask: np.ndarray) -> np.ndarray:
    """The boxes around the connected components of a mask, (n, 4) x0, y0, x1, y1: a mask may show several objects."""
    slices = ndimage.find_objects(ndimage.label(mask)[0])
    boxes = [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in slices]
    return np.array(boxes, np.int64).reshape(len(boxes), 4)


def open_parts(store: str, name: str, config: Config) -> PartTables:
    """The tables of a co-segmentation. Raises RequestError where there are none, or they are empty."""
    options = config.storage.options
    tables = PartTables.open_existing(store, name, options)
    if tables is None or not tables.images.files():
        there = ", ".join(PartTables.all_in(store, options)) or "none"
        raise RequestError(
            f"The store has no parts {name} (it has {there}): make them with `dinoray cosegment {store} {name}`."
        )
    return tables


def rows_of(tables: PartTables, columns: list[str]) -> Any:
    """Rows of parts/NAME/images, few at a time in memory."""
    for path in tables.images.files():
        with open_parquet(f"{tables.images.uri}/{path}", tables.options) as parquet:
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()


def about_missing(image_ids: list[str], where: str) -> list[str]:
    """Messages about images that are not annotated."""
    if not image_ids:
        return []
    more = f" and {len(image_ids) - MAX_NAMES_SHOWN:,} more" if len(image_ids) > MAX_NAMES_SHOWN else ""
    one = len(image_ids) == 1
    return [
        f"{counted(len(image_ids), 'image')} {'has' if one else 'have'} no annotation in {where} and "
        f"{'does' if one else 'do'} not count: {', '.join(image_ids[:MAX_NAMES_SHOWN])}{more}."
    ]
