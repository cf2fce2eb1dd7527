"""How a store's settings have images resized and cropped."""

from __future__ import annotations

from dino_ops.images import ImageSpec
from pipelines.settings.sections import Config


def image_spec(config: Config) -> ImageSpec:
    """The section `image`, as dino_ops takes it."""
    image = config.image
    return ImageSpec(
        shorter_side=image.shorter_side,
        size_hw=image.size,
        resample=image.resample,
        crop=image.crop,
        max_pixels=image.max_pixels,
    )
