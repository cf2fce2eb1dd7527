"""Images in: bytes of any kind to the exact pixels a model sees, and patch coordinates back to the original image.

Needs only numpy and Pillow, so that decoding workers load no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from dino_ops.decoding import decode_image as decode_image
from dino_ops.decoding import orient_and_convert
from dino_ops.errors import ImageError

DEFAULT_MAX_PIXELS = 178_956_970  # Pillow's own limit for certain bombs: 512 MiB of RGB

_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class ImageSpec:
    """How an image is brought to the size the model sees.

    shorter_side: pixels of the shorter side after resizing, aspect ratio kept; used when size_hw is None.
    size_hw: exactly (height, width) pixels instead. Both None: native size.
    resample: Pillow's antialiased filter.
    crop: "patch" cuts the right and bottom edge to multiples of the patch, so coordinates keep their origin.
    max_pixels: largest height x width accepted, of the file and of the resized image.
    """

    shorter_side: int | None = 224
    size_hw: tuple[int, int] | None = None
    resample: Literal["lanczos", "bicubic"] = "lanczos"
    crop: Literal["none", "patch"] = "none"
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        sides = [self.shorter_side] if self.size_hw is None else list(self.size_hw)
        if any(side is not None and side < 1 for side in sides):
            raise ValueError(f"image sizes are positive numbers of pixels, not {sides}")
        if self.resample not in _FILTERS:
            raise ValueError(f"resample is lanczos or bicubic, not {self.resample!r}")
        if self.crop not in ("none", "patch"):
            raise ValueError(f"crop is none or patch, not {self.crop!r}")

    def resized_hw(self, height: int, width: int) -> tuple[int, int]:
        """Size (height, width) in pixels of a height x width image after resizing, before any crop."""
        if self.size_hw is not None:
            return self.size_hw
        if self.shorter_side is None:
            return height, width
        # The longer side is truncated, not rounded: torchvision's Resize, which the reference uses.
        if height <= width:
            return self.shorter_side, int(self.shorter_side * width / height)
        return int(self.shorter_side * height / width), self.shorter_side


@dataclass(frozen=True)
class PreparedImage:
    """What the model sees of an image.

    pixels: (H, W, 3) uint8 RGB, resized and cropped.
    width, height: pixels of the original after EXIF orientation.
    scale_y, scale_x: original pixels per model pixel (original / resized, before the crop).
    """

    pixels: np.ndarray
    width: int
    height: int
    scale_y: float
    scale_x: float


def prepare_image(image: bytes | Image.Image | np.ndarray, spec: ImageSpec, patch_size: int) -> PreparedImage:
    """Decode, orient, resize and crop one image ("Deep ViT Features as Dense Visual Descriptors", preprocessing).

    image: the bytes of a file; a PIL image, whose EXIF orientation is applied; or an (H, W, 3) uint8 RGB array.
    patch_size: pixels; at least one patch must fit into the result.

    Raises ImageError when the image cannot be decoded, is too large, or is smaller than a patch.
    """
    rgb = _as_rgb(image, spec.max_pixels)
    resized_h, resized_w = spec.resized_hw(rgb.height, rgb.width)
    if min(resized_h, resized_w) < patch_size:
        raise ImageError(
            f"a {rgb.width} x {rgb.height} image becomes {resized_w} x {resized_h} pixels, "
            f"less than one {patch_size} x {patch_size} patch"
        )
    if resized_h * resized_w > spec.max_pixels:
        raise ImageError(
            f"a {rgb.width} x {rgb.height} image would be resized to {resized_w} x {resized_h} pixels, "
            f"more than the {spec.max_pixels:,} allowed"
        )
    width, height = rgb.size
    if (resized_w, resized_h) != rgb.size:
        rgb = rgb.resize((resized_w, resized_h), _FILTERS[spec.resample])
    pixels = np.array(rgb, dtype=np.uint8)
    if spec.crop == "patch":
        pixels = pixels[: resized_h // patch_size * patch_size, : resized_w // patch_size * patch_size]
        pixels = np.ascontiguousarray(pixels)
    return PreparedImage(pixels, width, height, scale_y=height / resized_h, scale_x=width / resized_w)


def patch_centres(
    grid_hw: tuple[int, int], stride: int, patch_size: int, scale_y: float, scale_x: float
) -> tuple[np.ndarray, np.ndarray]:
    """Centres of all patches in pixels of the original image: (y, x), each (grid height, grid width) float32.

    The origin is the image's top left corner, so the centre of the top left pixel is at (0.5, 0.5).
    """
    y = (np.arange(grid_hw[0]) * stride + patch_size / 2) * scale_y
    x = (np.arange(grid_hw[1]) * stride + patch_size / 2) * scale_x
    y_grid, x_grid = np.meshgrid(y.astype(np.float32), x.astype(np.float32), indexing="ij")
    return y_grid, x_grid


def _as_rgb(image: bytes | Image.Image | np.ndarray, max_pixels: int) -> Image.Image:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return decode_image(bytes(image), max_pixels)
    if isinstance(image, Image.Image):
        return orient_and_convert(image, max_pixels)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image is bytes, a PIL image or an array, not {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"an image array is (height, width, 3) uint8, not {image.shape} {image.dtype}")
    if 0 in image.shape:
        raise ImageError(f"the image array has no pixels: its shape is {image.shape}")
    return Image.fromarray(np.ascontiguousarray(image))
