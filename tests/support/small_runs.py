"""What several pipeline tests share: a small model's settings and generated photos."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config

SMALL_MODEL = [
    "model.name=vit_tiny_patch16_224",
    "model.weights=random",
    "image.shorter_side=64",
    "run.workers=1",
]


def settings(*overrides: str) -> Config:
    """A configuration with a small random model."""
    return load_config([], [*SMALL_MODEL, *overrides])


def as_options(*overrides: str) -> list[str]:
    """The same for the command line."""
    return [part for override in (*SMALL_MODEL, *overrides) for part in ("--set", override)]


def photo(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """A smooth random picture, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
