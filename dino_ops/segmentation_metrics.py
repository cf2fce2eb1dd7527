"""How well a foreground mask agrees with the annotated one, as co-segmentation is evaluated.

Precision is the fraction of all pixels labelled right, background included, and Jaccard the intersection over the union
of the foregrounds: the two numbers of Rubinstein et al., "Unsupervised Joint Object Discovery and Segmentation in
Internet Images" (CVPR 2013), and of Vicente et al., "Object Cosegmentation" (CVPR 2011). Both are per image; papers
report their means over images. CorLoc (Deselaers et al., "Localizing Objects while Learning Their Appearance", ECCV
2010) is the fraction of images whose box has an intersection over union of at least 0.5 with an annotated one.

Masks are (height, width), bool or numbers that are 0 outside the object. Boxes are (x0, y0, x1, y1) in pixels, x1 and
y1 just outside: a box of one pixel is (x, y, x + 1, y + 1).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy import ndimage

BoxAround = Literal["largest_component", "mask"]

LOCALISED = 0.5


def jaccard(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of the foregrounds, 0..1; 1 where both are empty: the mask is right."""
    found, true = _masks(mask, truth)
    union = int((found | true).sum())
    return int((found & true).sum()) / union if union else 1.0


def pixel_precision(mask: np.ndarray, truth: np.ndarray) -> float:
    """The fraction of pixels labelled right, foreground and background alike, 0..1. nan for an image without pixels."""
    found, true = _masks(mask, truth)
    return float((found == true).mean()) if found.size else float("nan")


def localised(mask: np.ndarray, truth_boxes_xyxy: np.ndarray, *, around: BoxAround = "largest_component") -> bool:
    """Whether the box around a mask meets CorLoc's bar with any of the annotated boxes (n, 4).

    around: what the box encloses. Single-object discovery uses the largest component (LOST, TokenCut); "mask"
    takes all of it. An empty mask has no box and localises nothing, and without annotated boxes nothing is right.
    """
    box = mask_box(mask, around=around)
    return box is not None and any(box_iou(box, np.asarray(truth)) >= LOCALISED for truth in truth_boxes_xyxy)


def mask_box(mask: np.ndarray, *, around: BoxAround = "largest_component") -> np.ndarray | None:
    """The box around a mask, (4,) int64, or None for an empty one.

    Pixels are connected through their sides; of components of equal size the first in raster order counts.
    """
    inside = np.asarray(mask) != 0
    if around == "largest_component":
        components, count = ndimage.label(inside)
        if count > 1:
            inside = components == 1 + np.bincount(components.ravel())[1:].argmax()
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.int64)


def box_iou(box_a: np.ndarray, box_b: np.ndarray) -> float:
    """Intersection over union of two boxes; 0 where both are without area."""
    sides = np.minimum(box_a[2:], box_b[2:]) - np.maximum(box_a[:2], box_b[:2])
    common = float(np.prod(np.maximum(sides, 0)))
    union = float(np.prod(box_a[2:] - box_a[:2]) + np.prod(box_b[2:] - box_b[:2])) - common
    return common / union if union > 0 else 0.0


def _masks(mask: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(mask) != np.shape(truth):
        raise ValueError(f"a mask of {np.shape(mask)} cannot be compared with an annotation of {np.shape(truth)}")
    return np.asarray(mask) != 0, np.asarray(truth) != 0
