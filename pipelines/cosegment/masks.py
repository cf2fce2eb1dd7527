"""One image of a set: from its descriptors and the set's clusters to masks at the size of the original.

The foreground is cut along the image's edges by GrabCut and the parts by a dense CRF, each by itself, as published.
With num_parts=1 and two stages the one part is the foreground itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dino_ops.cosegmentation import ForegroundModel, foreground_patches
from dino_ops.images import ImageSpec
from dino_ops.mask_refinement import grabcut, resize_mask
from dino_ops.parts import BACKGROUND, PartModel, nearest_parts, parts_of_patches, smooth_parts
from pipelines.settings.sections import CosegmentSettings
from pipelines.store.patches import ImagePlace

# A mask has one byte a pixel, of which 0 is the background.
MOST_PARTS_IN_A_MASK = 255


@dataclass(frozen=True)
class SetImage:
    """An image of a set: where its patches are, its sizes in pixels, and where its bytes are if they are needed.

    run_id: of its extraction. width, height: of the original. inlier: whether it is like the others; see
    cosegment.remove_outliers. source: as `pipelines.sources.fetch` takes it, None when the bytes are not needed or no
    longer available.
    """

    place: ImagePlace
    run_id: str
    width: int
    height: int
    model_width: int
    model_height: int
    inlier: bool = True
    source: dict[str, Any] | None = None

    @property
    def image_id(self) -> str:
        return self.place.image_id


@dataclass(frozen=True)
class SetModel:
    """The model fitted to a set of images. parts: None where the one part is the foreground."""

    foreground: ForegroundModel
    parts: PartModel | None

    @property
    def notes(self) -> tuple[str, ...]:
        return self.parts.notes if self.parts else self.foreground.notes


@dataclass(frozen=True)
class Segmented:
    """The masks of an image.

    parts: (height, width) int32 of the original, -1 for background. foreground: (height, width) bool.
    patch_parts: the grid, int32. notes: what was unusual about this image.
    """

    parts: np.ndarray
    foreground: np.ndarray
    patch_parts: np.ndarray
    notes: tuple[str, ...]


def parts_are_foreground(asked: CosegmentSettings) -> bool:
    return asked.num_parts == 1 and not asked.three_stages


def segment(
    model: SetModel,
    image: SetImage,
    descriptor: np.ndarray | None,
    pixels: np.ndarray | None,
    spec: ImageSpec,
) -> Segmented:
    """Masks of one image.

    descriptor: (grid height, grid width, D); None for an outlier, whose masks are empty. pixels: (H, W, 3) uint8 as
    the model saw them, along whose edges masks are refined; None leaves them in steps of patches.
    """
    grid = image.place.grid
    if descriptor is None:
        nothing = np.full((image.height, image.width), BACKGROUND, np.int32)
        note = "unlike the other images of its set, so its masks are empty"
        return Segmented(nothing, nothing >= 0, np.full(grid, BACKGROUND, np.int32), (note,))
    notes = []
    foreground = foreground_patches(model.foreground, descriptor)
    if not foreground.any() and model.foreground.salient.any():
        notes.append("none of its patches is in the common foreground")
    if pixels is None:
        parts = _as_part(foreground) if model.parts is None else nearest_parts(model.parts, descriptor)
        patch_parts = parts
    else:
        if foreground.any():
            cut = grabcut(foreground, pixels)
            foreground = cut.mask
            notes += [cut.note] if cut.note else []
        parts = _as_part(foreground) if model.parts is None else smooth_parts(model.parts, descriptor, pixels)
        patch_parts = parts_of_patches(parts, grid)
    return Segmented(
        parts=to_original(parts, image, spec, BACKGROUND),
        foreground=to_original(foreground, image, spec, False),
        patch_parts=patch_parts,
        notes=tuple(notes),
    )


def to_original(labels: np.ndarray, image: SetImage, spec: ImageSpec, outside: int | bool) -> np.ndarray:
    """Labels (h, w) of what the model saw at the size of the original; `outside` where a crop has cut it off."""
    resized_height, resized_width = spec.resized_hw(image.height, image.width)
    height = round(image.height * image.model_height / resized_height)
    width = round(image.width * image.model_width / resized_width)
    seen = resize_mask(labels, height, width)
    if seen.shape == (image.height, image.width):
        return seen
    whole = np.full((image.height, image.width), outside, labels.dtype)
    whole[:height, :width] = seen
    return whole


def _as_part(foreground: np.ndarray) -> np.ndarray:
    return np.where(foreground, 0, BACKGROUND).astype(np.int32)
