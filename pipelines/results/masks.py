"""Masks as PNG files of one channel."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def part_png(parts: np.ndarray) -> bytes:
    """Parts (H, W), -1 for background, as a PNG of part_id + 1."""
    return _png((parts + 1).astype(np.uint8))


def foreground_png(foreground: np.ndarray) -> bytes:
    """A mask (H, W) bool as a PNG of 0 and 255."""
    return _png(np.where(foreground, 255, 0).astype(np.uint8))


def read_png(data: bytes) -> np.ndarray:
    """The values of a PNG of one channel: (H, W) uint8."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def _png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
