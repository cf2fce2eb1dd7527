"""evaluate pck: percentage of correct key points, from annotated pairs and the patches of a store.

    annotations -> images of the store -> tiles of images of a class -> every pair's points carried over -> PCK

Each source point becomes its nearest patch, that patch's nearest neighbour in the target by cosine is looked up, and
the distance of its centre to the target's point counts, in pixels of the original image (dino_ops/keypoints.py).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dino_ops.keypoints import transfer_points
from dino_ops.metrics import box_side, image_side, keypoint_box_side, pck
from pipelines.errors import RequestError
from pipelines.evaluate.annotations import AnnotatedPair, read_annotations
from pipelines.running.reports import JobResult, RunReport, new_run_id, recorded
from pipelines.settings.sections import Config, ExtraFeature, FeatureSettings
from pipelines.store.patches import ImagePlace, PatchMap, read_patch_maps
from pipelines.store.store import Store

THRESHOLDS = {
    "keypoint_box": "alpha x longer side of the box around the target's key points",
    "box": "alpha x longer side of the target's annotated bounding box (SPair-71k)",
    "image": "alpha x longer side of the target image",
}
# 300 MB of a small model's descriptors.
MAX_PATCHES_IN_MEMORY = 200_000


@dataclass
class Result(JobResult):
    """PCK of a store's descriptors.

    descriptor: the column of patches. thresholds: what the thresholds mean that the annotations allow, by name.
    scores: one row per class and threshold, `all` for all classes together: category, threshold, pairs, points, and
    per_pair and per_point, each a list of fractions in the order of alphas.
    """

    annotations: str
    layout: str = ""
    descriptor: str = ""
    facet: str = ""
    layer: int = 0
    binned: bool = False
    alphas: list[float] = field(default_factory=list)
    images: int = 0
    pairs: int = 0
    points: int = 0
    thresholds: dict[str, str] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _ImageFacts:
    """Where an image's patches are, and the size of the original in pixels."""

    place: ImagePlace
    height: int
    width: int


@dataclass
class _Points:
    """What is known of the points so far, pair by pair.

    categories: each pair's class. errors: (n,) for each pair, the distances of its points in pixels of the target.
    lengths: threshold -> each pair's length in pixels.
    """

    categories: list[str] = field(default_factory=list)
    errors: list[np.ndarray] = field(default_factory=list)
    lengths: dict[str, list[float]] = field(default_factory=dict)


def run(config: Config, *, store: str, annotations: str) -> Result:
    """Evaluate point correspondence on a store whose images are annotated; settings: section evaluate.

    Raises RequestError for annotations that are not there or name images that the store lacks, a column that the
    store does not have, and a store that holds a part of the patches only.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    settings = config.evaluate
    opened.requires("PCK", whole_grid=True, descriptor=("evaluate.descriptor", settings.descriptor))
    feature = _feature(opened, settings.descriptor)
    annotated = read_annotations(annotations, settings.split, config.storage.options)
    images = _find_images(opened, annotated.images)
    _refuse_other_sizes(opened, annotated.pairs, images)
    result = Result(new_run_id(), opened.uri, annotations, annotated.layout, settings.descriptor)
    result.facet, result.layer, result.binned = feature.facet, feature.layer, settings.binned
    result.alphas, result.images = list(settings.alphas), len(images)
    asked = {"annotations": annotations}
    report = RunReport("evaluate pck", opened.uri, config, result.run_id, asked, optional=True)
    with recorded(report, result, started):
        points = _carry_points(opened, annotated.pairs, images, config)
        result.pairs, result.points = len(points.errors), sum(len(errors) for errors in points.errors)
        result.thresholds = {name: THRESHOLDS[name] for name in THRESHOLDS if name in points.lengths}
        result.scores = _scores(points, settings.alphas)
        if outside := sum(_outside(pair, images) for pair in annotated.pairs):
            result.messages.append(
                f"{outside:,} of {2 * result.points:,} annotated points lie outside their images: for such a source "
                "point the nearest patch is used."
            )
    return result


def _feature(store: Store, column: str) -> FeatureSettings | ExtraFeature:
    """The layer and facet of a descriptor column."""
    features = store.config.features
    return features if column == "descriptor" else next(extra for extra in features.extra if extra.column == column)


def _find_images(store: Store, names: list[str]) -> dict[str, _ImageFacts]:
    """The store's image for each name CLASS/FILE: the one whose image_id is that, or ends with / and that.

    Raises RequestError for a name that no image or several images have.
    """
    columns = ["image_id", "shard", "grid_height", "grid_width", "height", "width"]
    by_ending: dict[str, list[dict[str, Any]]] = {}
    for row in store.images.read(columns).to_pylist():
        by_ending.setdefault("/".join(row["image_id"].split("/")[-2:]), []).append(row)
    missing = [name for name in names if name not in by_ending]
    if missing:
        more = f" (and {len(missing) - 1:,} more of {len(names):,})" if len(missing) > 1 else ""
        raise RequestError(
            f"The store {store.uri} has no image whose image_id ends with {missing[0]}{more}: extract the folder that "
            "holds the annotated images."
        )
    found = {}
    for name in names:
        row, *others = by_ending[name]
        if others:
            raise RequestError(
                f"Several images of {store.uri} end with {name}: {row['image_id']} and {others[0]['image_id']}."
            )
        if row["shard"] is None:
            raise RequestError(f"The store {store.uri} has no patches of {row['image_id']}.")
        place = ImagePlace(row["image_id"], row["shard"], (row["grid_height"], row["grid_width"]))
        found[name] = _ImageFacts(place, row["height"], row["width"])
    return found


def _refuse_other_sizes(store: Store, pairs: list[AnnotatedPair], images: dict[str, _ImageFacts]) -> None:
    """Raises RequestError where an image is not of the size that was annotated: its points would be elsewhere."""
    for pair in pairs:
        for name, annotated in ((pair.source, pair.source_size_wh), (pair.target, pair.target_size_wh)):
            stored = (images[name].width, images[name].height)
            if annotated is not None and annotated != stored:
                raise RequestError(
                    f"{name} was annotated at {annotated[0]} x {annotated[1]} pixels, but {store.uri} was made of one "
                    f"with {stored[0]} x {stored[1]}: extract the images that the annotations come with."
                )


def _outside(pair: AnnotatedPair, images: dict[str, _ImageFacts]) -> int:
    """How many points of a pair lie outside of their image."""
    sides = ((images[pair.source], pair.source_xy), (images[pair.target], pair.target_xy))
    return sum(int(((xy < 0) | (xy > (facts.width, facts.height))).any(axis=1).sum()) for facts, xy in sides)


def _carry_points(store: Store, pairs: list[AnnotatedPair], images: dict[str, _ImageFacts], config: Config) -> _Points:
    points = _Points()
    for some, maps in _with_maps(store, pairs, images, config):
        for pair in some:
            source, target = maps[pair.source], maps[pair.target]
            found = transfer_points(
                pair.source_xy,
                source.descriptor,
                (source.y, source.x),
                target.descriptor,
                (target.y, target.x),
                binned=config.evaluate.binned,
            )
            facts = images[pair.target]
            points.categories.append(pair.category)
            points.errors.append(np.linalg.norm(found - pair.target_xy, axis=1))
            lengths = {
                "keypoint_box": keypoint_box_side(pair.target_xy),
                "image": image_side(facts.height, facts.width),
            }
            if pair.target_box_xyxy is not None:
                lengths["box"] = box_side(pair.target_box_xyxy)
            for name, length in lengths.items():
                points.lengths.setdefault(name, []).append(length)
    return points


def _with_maps(
    store: Store, pairs: list[AnnotatedPair], images: dict[str, _ImageFacts], config: Config
) -> Iterator[tuple[list[AnnotatedPair], dict[str, PatchMap]]]:
    """Yield pairs with the patches of their images, two tiles of a class at a time, so that memory stays bounded."""
    by_category: dict[str, list[AnnotatedPair]] = {}
    for pair in pairs:
        by_category.setdefault(pair.category, []).append(pair)
    half = store.config.store.dtype == "float16"
    for of_category in by_category.values():
        names = sorted({name for pair in of_category for name in (pair.source, pair.target)})
        tile_of = _tiles(names, images)
        by_tiles: dict[tuple[int, int], list[AnnotatedPair]] = {}
        for pair in of_category:
            by_tiles.setdefault((tile_of[pair.source], tile_of[pair.target]), []).append(pair)
        for _, some in sorted(by_tiles.items(), key=lambda item: item[0]):
            needed = {name: images[name].place for pair in some for name in (pair.source, pair.target)}
            read = read_patch_maps(store.uri, needed.values(), config.evaluate.descriptor, half, config.storage.options)
            yield some, {name: read.of(place.image_id) for name, place in needed.items()}


def _tiles(names: list[str], images: dict[str, _ImageFacts]) -> dict[str, int]:
    """The tile of each image: a run of images with at most half of MAX_PATCHES_IN_MEMORY, or one image."""
    cells = [images[name].place.grid[0] * images[name].place.grid[1] for name in names]
    tile_of, tile, held = {}, 0, 0
    for name, count in zip(names, cells, strict=True):
        if held and held + count > MAX_PATCHES_IN_MEMORY // 2:
            tile, held = tile + 1, 0
        tile_of[name] = tile
        held += count
    return tile_of


def _scores(points: _Points, alphas: tuple[float, ...]) -> list[dict[str, Any]]:
    categories = np.array(points.categories)
    counts = np.array([len(errors) for errors in points.errors])
    groups = [(category, categories == category) for category in sorted({*points.categories})]
    groups.append(("all", np.ones(len(categories), bool)))
    scores = []
    for (category, chosen), name in itertools.product(groups, THRESHOLDS):
        if name not in points.lengths:
            continue
        rows = np.repeat(chosen, counts)
        found = pck(
            np.concatenate(points.errors)[rows],
            np.repeat(points.lengths[name], counts)[rows],
            np.repeat(np.arange(len(counts)), counts)[rows],
            alphas,
        )
        scores.append(
            {
                "category": category,
                "threshold": name,
                "pairs": int(chosen.sum()),
                "points": int(rows.sum()),
                "per_pair": [round(float(value), 6) for value in found.per_pair],
                "per_point": [round(float(value), 6) for value in found.per_point],
            }
        )
    return scores
