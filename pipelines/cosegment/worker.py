"""What runs on workers: fitting a set of images, and writing the masks of images into files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dino_ops.cosegmentation import ForegroundModel, fit_foreground
from dino_ops.parts import PartModel, fit_common_parts, fit_parts
from dino_ops.published_kmeans import FaissKMeans
from pipelines import storage
from pipelines.cosegment.masks import Segmented, SetImage, SetModel, parts_are_foreground, segment
from pipelines.cosegment.pictures import Cropper, Picture, read_pictures
from pipelines.cosegment.spill import SpilledArrays
from pipelines.errors import JobError
from pipelines.features.image_spec import image_spec
from pipelines.results.masks import foreground_png, part_png
from pipelines.results.parts import VERSIONED, SegmentReport, keys_of
from pipelines.settings.sections import Config, CosegmentSettings
from pipelines.store.arrays import npz_bytes, read_npz
from pipelines.store.parquet import ROWS_PER_ROW_GROUP, DamagedFile, new_file_name, write_parquet
from pipelines.store.patches import PatchMap, read_patch_maps
from pipelines.store.schemas import PARTS_IMAGES, PARTS_PATCHES

# 75 MB of a small model's descriptors.
PATCHES_READ_AT_ONCE = 50_000
# Parts of an image whose picture cannot be read are smoothed without its edges.
GREY_OF_MISSING_PICTURE = 127


@dataclass(frozen=True)
class SegmentSetup:
    """All that a worker needs to know; small, since it travels with every task.

    tables: parts/NAME. config: of the store, with the section cosegment of this run. weights: their identity in the
    store's spec. device: of the model, which crops need. memory: bytes of descriptors and pictures that a task may
    hold.
    """

    store: str
    tables: str
    run_id: str
    config: Config
    weights: str
    device: str
    memory: float

    @property
    def asked(self) -> CosegmentSettings:
        return self.config.cosegment

    @property
    def half(self) -> bool:
        """Descriptors are stored rounded to half precision, so holding them as such loses nothing."""
        return self.config.store.dtype == "float16"


@dataclass(frozen=True)
class SetWork:
    """A set, or a part of one: what it is fitted on, and which of its images are to be segmented.

    version: the set_version of its members.
    """

    set_id: str
    version: str
    fit_on: list[SetImage]
    images: list[SetImage]


@dataclass
class Spent:
    """Where a task's time went, and what it read."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0

    @contextlib.contextmanager
    def on(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began


@dataclass
class FittedSet:
    """A set that several tasks share, or why it cannot be fitted."""

    model: SetModel | None
    failed: str = ""
    spent: Spent = field(default_factory=Spent)


def segment_sets(setup: SegmentSetup, works: Sequence[SetWork]) -> SegmentReport:
    """Fit whole sets and segment their images, into one file of each table."""
    rows, spent, failed = _Rows(setup), Spent(), {}
    for work in works:
        with SpilledArrays(setup.memory) as descriptors:
            try:
                model = _fit(setup, work.fit_on, descriptors, spent)
            except ValueError as error:
                # such as descriptors that are not finite
                failed[work.set_id] = str(error)
                continue
            at = {image.image_id: number for number, image in enumerate(work.fit_on)}
            maps = (descriptors[at[image.image_id]] if image.inlier else None for image in work.images)
            _segment(setup, work, model, maps, rows, spent)
    return rows.write(spent, failed)


def fit_set(setup: SegmentSetup, work: SetWork) -> FittedSet:
    """Fit a set that is segmented by several tasks; what an earlier run fitted for the same members is used again."""
    spent = Spent()
    uri = storage.join(setup.tables, "models", f"{work.version}.npz")
    options = setup.config.storage.options
    model = read_model(uri, options)
    if model is None:
        with SpilledArrays(setup.memory) as descriptors:
            try:
                model = _fit(setup, work.fit_on, descriptors, spent)
            except ValueError as error:
                return FittedSet(None, str(error), spent)
        storage.write_once(uri, model_bytes(model), options)
        # of two runs at once the first decides
        model = read_model(uri, options)
    return FittedSet(model, "", spent)


def segment_batch(setup: SegmentSetup, work: SetWork, fitted: FittedSet) -> SegmentReport:
    """Segment some images of a set that was fitted before."""
    rows, spent = _Rows(setup), Spent()
    assert fitted.model is not None
    inliers = read_maps(setup, [image for image in work.images if image.inlier], spent)
    maps = (next(inliers).descriptor if image.inlier else None for image in work.images)
    _segment(setup, work, fitted.model, maps, rows, spent)
    return rows.write(spent, {})


def read_maps(setup: SegmentSetup, images: Sequence[SetImage], spent: Spent) -> Iterator[PatchMap]:
    """The patches of each image, in order; few images at a time are held."""
    first = 0
    while first < len(images):
        end, patches = first, 0
        while end < len(images) and (end == first or patches < PATCHES_READ_AT_ONCE):
            patches += images[end].place.grid[0] * images[end].place.grid[1]
            end += 1
        with spent.on("read"):
            places = [image.place for image in images[first:end]]
            maps = read_patch_maps(
                setup.store, places, setup.asked.descriptor, setup.half, setup.config.storage.options
            )
        spent.bytes_read += maps.bytes_read
        for image in images[first:end]:
            yield maps.of(image.image_id)
        first = end


def _fit(setup: SegmentSetup, images: Sequence[SetImage], descriptors: SpilledArrays, spent: Spent) -> SetModel:
    """Fit a set; `descriptors` then holds the maps of its images, in order, and after them those of crops.

    Raises ValueError for descriptors that cannot be clustered.
    """
    asked = setup.asked
    saliency: list[np.ndarray | None] = []
    for patches in read_maps(setup, images, spent):
        descriptors.append(patches.descriptor)
        saliency.append(patches.saliency)
    with SpilledArrays(setup.memory) as pixels, spent.on("fit"):
        smoothed = asked.three_stages and asked.refine
        if smoothed or asked.crop_augmentations:
            pictures = _pictures(setup, images)
            _add_pictures(setup, images, pictures, descriptors, pixels)
            saliency += [None] * (len(descriptors) - len(images))
        kmeans = FaissKMeans(seed=asked.seed)
        foreground = fit_foreground(
            descriptors,
            saliency,
            elbow=asked.elbow,
            votes_percentage=asked.votes_percentage,
            saliency_threshold=asked.saliency_threshold,
            sample_interval=asked.sample_interval,
            voting=asked.voting,
            kmeans=kmeans,
        )
        if parts_are_foreground(asked):
            return SetModel(foreground, None)
        if not asked.three_stages:
            parts = fit_parts(
                foreground,
                descriptors,
                num_parts=asked.num_parts,
                sample_interval=asked.sample_interval,
                kmeans=kmeans,
            )
            return SetModel(foreground, parts)
        parts = fit_common_parts(
            foreground,
            descriptors,
            pixels if smoothed else None,
            [one is not None for one in saliency],
            num_parts=asked.num_parts,
            elbow_second_stage=asked.elbow_second_stage,
            sample_interval=asked.sample_interval,
            kmeans=kmeans,
        )
        return SetModel(foreground, parts)


def _pictures(setup: SegmentSetup, images: Sequence[SetImage]) -> Iterator[Picture]:
    return read_pictures(images, image_spec(setup.config), setup.config.storage.options, setup.config.run.attempts)


def _add_pictures(
    setup: SegmentSetup,
    images: Sequence[SetImage],
    pictures: Iterable[Picture],
    descriptors: SpilledArrays,
    pixels: SpilledArrays,
) -> None:
    """Add the pictures of images to `pixels`, and after them those of crops, whose maps join `descriptors`.

    An image whose picture cannot be read has no crops.
    """
    cropper = None
    if setup.asked.crop_augmentations:
        cropper = Cropper(setup.store, setup.config, setup.weights, setup.device, setup.run_id)
    with SpilledArrays(setup.memory) as of_crops:
        for image, (picture, _) in zip(images, pictures, strict=True):
            grey = np.full((image.model_height, image.model_width, 3), GREY_OF_MISSING_PICTURE, np.uint8)
            pixels.append(grey if picture is None else picture)
            if cropper and picture is not None:
                for descriptor, crop in cropper.crops(image.image_id, picture):
                    descriptors.append(descriptor.astype(np.float16) if setup.half else descriptor)
                    of_crops.append(crop)
        for number in range(len(of_crops)):
            pixels.append(of_crops[number])


def _segment(
    setup: SegmentSetup,
    work: SetWork,
    model: SetModel,
    maps: Iterable[np.ndarray | None],
    rows: _Rows,
    spent: Spent,
) -> None:
    """Segment the images of `work` into `rows`."""
    of_set = [*model.notes]
    if len(work.fit_on) == 1 and len(work.images) == 1:
        of_set.insert(0, "the only image of its set")
    pictures: Iterable[Picture] = (
        _pictures(setup, work.images) if setup.asked.refine else ((None, "") for _ in work.images)
    )
    for image, descriptor, (pixels, why_not) in zip(work.images, maps, pictures, strict=True):
        with spent.on("segment"):
            found = segment(model, image, descriptor, pixels, image_spec(setup.config))
            unrefined = [f"not refined: {why_not}"] if why_not and descriptor is not None else []
            rows.add(work, image, found, [*of_set, *found.notes, *unrefined])


class _Rows:
    """Rows of both tables, until they are written."""

    def __init__(self, setup: SegmentSetup) -> None:
        self._setup = setup
        self._name = new_file_name(setup.run_id)
        self._images: list[dict[str, Any]] = []
        self._patches_of_each_image: list[pa.Table] = []

    def add(self, work: SetWork, image: SetImage, found: Segmented, notes: list[str]) -> None:
        self._images.append(
            {
                "image_id": image.image_id,
                "set_id": work.set_id,
                "foreground_fraction": float((found.parts >= 0).mean()),
                "mask_png": part_png(found.parts),
                "foreground_png": foreground_png(found.foreground),
                "note": "; ".join(dict.fromkeys(notes)) or None,
                "shard": self._name,
                "run_id": image.run_id,
                "set_version": work.version,
            }
        )
        row, col = np.divmod(np.arange(found.patch_parts.size, dtype=np.int32), found.patch_parts.shape[1])
        columns: dict[str, Any] = {
            "image_id": pa.repeat(image.image_id, len(row)),
            "set_id": pa.repeat(work.set_id, len(row)),
            "row": row,
            "col": col,
            "part_id": found.patch_parts.reshape(-1),
        }
        self._patches_of_each_image.append(pa.table(columns).cast(PARTS_PATCHES))

    def write(self, spent: Spent, failed: dict[str, str]) -> SegmentReport:
        """A file of each table, in the order of their keys; none when there are no rows."""
        began = time.monotonic()
        options, tables = self._setup.config.storage.options, self._setup.tables
        report = SegmentReport(None, None, failed=failed, bytes_read=spent.bytes_read)
        if self._images:
            order = sorted(
                range(len(self._images)), key=lambda at: (self._images[at]["image_id"], self._images[at]["set_id"])
            )
            images = pa.Table.from_pylist([self._images[at] for at in order], schema=PARTS_IMAGES)
            patches = pa.concat_tables([self._patches_of_each_image[at] for at in order])
            report.patches = write_parquet(
                storage.join(tables, "patches"), self._name, patches, options, ROWS_PER_ROW_GROUP
            )
            report.images = write_parquet(storage.join(tables, "images"), self._name, images, options)
            report.keys = keys_of(images).to_pylist()
            report.rows = images.select([*VERSIONED, "run_id", "foreground_fraction", "note"])
            report.bytes_written = report.patches.size + report.images.size
        report.seconds = spent.seconds | {"write": time.monotonic() - began}
        return report


def model_bytes(model: SetModel) -> bytes:
    """A model as an .npz file."""
    arrays = {f"foreground_{name}": array for name, array in model.foreground.to_arrays().items()}
    if model.parts is not None:
        arrays |= {f"parts_{name}": array for name, array in model.parts.to_arrays().items()}
    return npz_bytes(arrays)


def read_model(uri: str, options: storage.Options) -> SetModel | None:
    """The model at `uri`, or None when there is none. Raises JobError for one that is damaged."""
    try:
        arrays = read_npz(uri, options)
        if arrays is None:
            return None
        of = {
            kind: {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
            for kind in ("foreground_", "parts_")
        }
        parts = PartModel.from_arrays(of["parts_"]) if of["parts_"] else None
        return SetModel(ForegroundModel.from_arrays(of["foreground_"]), parts)
    except (DamagedFile, KeyError, ValueError):
        raise JobError(f"{uri} is damaged: remove it and run the same command again.") from None
