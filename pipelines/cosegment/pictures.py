"""The pictures of images in a store, as the model saw them, and crops of them with their descriptors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from dino_ops.crops import random_crops
from dino_ops.errors import ImageError
from dino_ops.images import ImageSpec, prepare_image
from pipelines import storage
from pipelines.cosegment.masks import SetImage
from pipelines.features.same_features import stored_form
from pipelines.settings.sections import Config
from pipelines.sources import LISTING_SCHEMA, fetch
from pipelines.store.projection import read_projections

PICTURES_HELD_AT_ONCE = 16

Picture = tuple[np.ndarray | None, str]
"""((H, W, 3) uint8, an empty text), or (None, why there is none)"""


def read_pictures(
    images: Sequence[SetImage], spec: ImageSpec, options: storage.Options, attempts: int
) -> Iterator[Picture]:
    """The picture of each image, resized and cropped as the model saw it, or why there is none, in order."""
    for first in range(0, len(images), PICTURES_HELD_AT_ONCE):
        chunk = images[first : first + PICTURES_HELD_AT_ONCE]
        rows = pa.Table.from_pylist([one.source for one in chunk if one.source], schema=LISTING_SCHEMA)
        fetched = iter(fetch(rows, storage_options=options, attempts=attempts))
        for image in chunk:
            if image.source is None:
                yield None, "its picture is no longer where it was"
                continue
            got = next(fetched)
            yield _as_seen(got.data, image, spec) if got.data else (None, f"its picture cannot be read ({got.error})")


def _as_seen(data: bytes, image: SetImage, spec: ImageSpec) -> Picture:
    """The model's size is known, so that no patch size is needed to crop."""
    try:
        prepared = prepare_image(data, replace(spec, crop="none"), patch_size=1)
    except ImageError as error:
        return None, f"its picture cannot be used ({error})"
    height, width = prepared.pixels.shape[:2]
    same = (prepared.height, prepared.width) == (image.height, image.width)
    if not same or height < image.model_height or width < image.model_width:
        return None, "its picture has changed since it was extracted"
    return np.ascontiguousarray(prepared.pixels[: image.model_height, : image.model_width]), ""


class Cropper:
    """Crops of pictures and the descriptors that the store's own spec gives them."""

    def __init__(self, store: str, spec: Config, expected_weights: str, device: str, run_id: str) -> None:
        from pipelines.features.extractor import ExtractorSetup, make_extractor

        self._extractor: Any = make_extractor(ExtractorSetup(store, run_id, spec, device, expected_weights, threads=0))
        self._column = spec.cosegment.descriptor
        self._dtype = spec.store.dtype
        self._projection = read_projections(store, spec).get(self._column)
        self._count, self._seed = spec.cosegment.crop_augmentations, spec.cosegment.seed

    def crops(self, image_id: str, pixels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(descriptor map, pixels as the model saw them) of each crop of a picture and of its mirror image."""
        own = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big")
        crops = random_crops(pixels, self._count, np.random.default_rng([self._seed, own]))
        prepared = [self._extractor.prepare(crop) for crop in crops]
        features = self._extractor.extract(prepared)
        return [
            (stored_form(one, self._column, self._dtype, self._projection), ready.pixels)
            for one, ready in zip(features, prepared, strict=True)
        ]
