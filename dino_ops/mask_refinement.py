"""Masks of patches to masks of pixels: brought to the image's size, and cut along its edges.

GrabCut as in the code published with "Deep ViT Features as Dense Visual Descriptors".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

# GrabCut decides about the pixels that are this near to the mask's edge.
GRABCUT_MARGIN_KERNEL = np.ones((7, 7), np.uint8)
GRABCUT_ITERATIONS = 5


@dataclass(frozen=True)
class RefinedMask:
    """mask: (H, W) bool. refined: whether it follows the image's edges. note: why not, or ""."""

    mask: np.ndarray
    refined: bool
    note: str = ""


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask (h, w) of bool, or part labels of int, at height x width, each pixel taking its nearest value.

    The published code asks Pillow for Lanczos, which for masks of one bit is the nearest value.
    """
    if 0 in mask.shape:
        raise ValueError(f"a mask of shape {mask.shape} has nothing to resize")
    kind = np.uint8 if mask.dtype == bool else np.int32
    resized = Image.fromarray(mask.astype(kind)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized).astype(mask.dtype)


def grabcut(mask: np.ndarray, rgb: np.ndarray) -> RefinedMask:
    """Move the edges of a mask to those of the image.

    mask: (h, w) bool, of patches or pixels; it is brought to the image's size first. rgb: (H, W, 3) uint8.

    The mask without its margin is certain foreground, the rest of the image without its margin certain background,
    and what lies between is probably foreground. Where GrabCut cannot work, as on an empty mask, the resized mask
    stays. The calling thread's random generator in OpenCV is seeded, so that the result does not depend on what ran
    before.
    """
    import cv2

    height, width = rgb.shape[:2]
    resized = resize_mask(mask, height, width)
    inside = resized.astype(np.uint8)
    trimap = np.full((height, width), cv2.GC_PR_FGD, np.uint8)
    trimap[cv2.erode(1 - inside, GRABCUT_MARGIN_KERNEL) == 1] = cv2.GC_BGD
    trimap[cv2.erode(inside, GRABCUT_MARGIN_KERNEL) == 1] = cv2.GC_FGD
    no_rectangle = (0, 0, width, height)  # ignored where a mask is given
    # GrabCut fills these two colour models.
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    try:
        labels, _, _ = cv2.grabCut(
            np.ascontiguousarray(rgb),
            trimap,
            no_rectangle,
            background,
            foreground,
            GRABCUT_ITERATIONS,
            cv2.GC_INIT_WITH_MASK,
        )
    except cv2.error as error:
        return RefinedMask(resized, refined=False, note=_why_not(resized, error))
    return RefinedMask(np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)), refined=True)


def _why_not(mask: np.ndarray, error: Exception) -> str:
    if not mask.any():
        return "not refined: there is no foreground"
    if mask.all():
        return "not refined: there is no background"
    return f"not refined: {error}"
