"""Multi-crop augmentation: two global crops of an image, which show most of it, and several small local ones.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021), section 3.1 and appendix B, after
SwAV (Caron et al. 2020). Needs only numpy and Pillow, so that workers that make crops load no torch. All randomness
comes from a generator that the caller seeds, so that an image's crops do not depend on who makes them, or when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

GLOBAL_CROPS = 2
CROP_WIDTH_PER_HEIGHT = (3 / 4, 4 / 3)
PLACEMENT_ATTEMPTS = 10
GREY_PROBABILITY = 0.2
JITTER_PROBABILITY = 0.8
# The kinds are the first global, the second global and a local crop.
BLUR_PROBABILITY_OF_KIND = (1.0, 0.1, 0.5)
SECOND_GLOBAL_SOLARISE_PROBABILITY = 0.2
# Smaller and larger global crops than PUBLISHED_GLOBAL_SIZE have a radius in proportion.
BLUR_RADIUS_PIXELS = (0.1, 2.0)
PUBLISHED_GLOBAL_SIZE = 224
# An evaluation looks at the middle of longer strips only.
MAX_SIDE_RATIO_SEEN_WHOLE = 16


@dataclass(frozen=True)
class Crops:
    """Crops of a batch of B images.

    whole: the global ones, (2, B, S, S, 3) uint8 RGB. local: (L, B, s, s, 3) uint8 RGB; L may be 0.
    """

    whole: np.ndarray
    local: np.ndarray

    @property
    def images(self) -> int:
        return self.whole.shape[1]

    def of(self, images: slice) -> Crops:
        """Those of some of the images."""
        return Crops(self.whole[:, images], self.local[:, images])

    @staticmethod
    def joined(parts: list[Crops]) -> Crops:
        """Those of several batches as one."""
        if len(parts) == 1:
            return parts[0]
        return Crops(*(np.concatenate([getattr(p, name) for p in parts], axis=1) for name in ("whole", "local")))


@dataclass(frozen=True)
class MultiCrop:
    """How crops are made.

    global_size, local_size: pixels of their sides. local_crops: how many local ones. global_scale, local_scale: least
    and largest share of the image's area that a crop covers. jitter: strengths, see colour_jitter.
    """

    global_size: int = 224
    local_size: int = 96
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)

    @property
    def least_side(self) -> int:
        """Pixels of an image's shorter side below which some crop would be enlarged more than in the whole image."""
        sides = [(self.global_size, self.global_scale[0]), (self.local_size, self.local_scale[0])]
        return max(math.ceil(size / math.sqrt(share * CROP_WIDTH_PER_HEIGHT[0])) for size, share in sides)

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Crops:
        """Crops of one RGB image; the same generator state gives the same ones."""
        whole = [self._crop(image, self.global_size, self.global_scale, at, generator) for at in range(GLOBAL_CROPS)]
        local = [
            self._crop(image, self.local_size, self.local_scale, GLOBAL_CROPS, generator)
            for _ in range(self.local_crops)
        ]
        none = np.zeros((0, self.local_size, self.local_size, 3), np.uint8)
        return Crops(np.stack(whole)[:, None], (np.stack(local) if local else none)[:, None])

    def _crop(
        self, image: Image.Image, size: int, scale: tuple[float, float], kind: int, generator: np.random.Generator
    ) -> np.ndarray:
        """One crop, (size, size, 3) uint8. kind: 0, 1 first and second global crop, 2 local."""
        crop = random_resized_crop(image, size, scale, generator)
        if generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if generator.random() < JITTER_PROBABILITY:
            crop = colour_jitter(crop, self.jitter, generator)
        if generator.random() < GREY_PROBABILITY:
            crop = crop.convert("L").convert("RGB")
        if generator.random() < BLUR_PROBABILITY_OF_KIND[kind]:
            radius = generator.uniform(*BLUR_RADIUS_PIXELS) * self.global_size / PUBLISHED_GLOBAL_SIZE
            crop = crop.filter(ImageFilter.GaussianBlur(radius))
        if kind == 1 and generator.random() < SECOND_GLOBAL_SOLARISE_PROBABILITY:
            crop = ImageOps.solarize(crop)
        return np.asarray(crop)


def random_resized_crop(
    image: Image.Image, size: int, scale: tuple[float, float], generator: np.random.Generator
) -> Image.Image:
    """A random part of an image with a share of its area in `scale`, brought to size x size pixels (bicubic).

    Where no drawn shape fits, the largest part in the middle whose shape is allowed.
    """
    width, height = image.size
    logarithms = np.log(CROP_WIDTH_PER_HEIGHT)
    for _ in range(PLACEMENT_ATTEMPTS):
        area = width * height * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(*logarithms))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.integers(0, height - h, endpoint=True))
            left = int(generator.integers(0, width - w, endpoint=True))
            break
    else:
        w = min(width, max(1, round(height * CROP_WIDTH_PER_HEIGHT[1])))
        h = min(height, max(1, round(width / CROP_WIDTH_PER_HEIGHT[0])))
        top, left = (height - h) // 2, (width - w) // 2
    # cut first: with `box` the filter would look at pixels outside of the crop
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)


def colour_jitter(
    image: Image.Image, strengths: tuple[float, float, float, float], generator: np.random.Generator
) -> Image.Image:
    """Brightness, contrast, saturation and hue of an RGB image, changed in random order.

    strengths: b, c, s draw factors from 1 - strength to 1 + strength; h shifts the hue by -h to h turns.
    """
    brightness, contrast, saturation, hue = strengths
    for operation in generator.permutation(4):
        if operation == 0:
            image = ImageEnhance.Brightness(image).enhance(_factor(brightness, generator))
        elif operation == 1:
            image = ImageEnhance.Contrast(image).enhance(_factor(contrast, generator))
        elif operation == 2:
            image = ImageEnhance.Color(image).enhance(_factor(saturation, generator))
        else:
            image = shift_hue(image, generator.uniform(-hue, hue))
    return image


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """An RGB image with its hue moved round the colour circle; 1 turn is the whole circle."""
    hue, saturation, value = image.convert("HSV").split()
    # 256 steps that wrap around: 8 bit arithmetic does what is meant
    step = int(turns * 255) % 256
    hue = hue.point([(level + step) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle of an RGB image as evaluation sees it: (size, size, 3) uint8.

    The shorter side is brought to 8/7 of size (bicubic), as 256 is to 224 (Caron et al. 2021, section 4.1).
    """
    shorter = resized_side(size)
    image = _without_ends(image)
    width, height = image.size
    if width <= height:
        resized = image.resize((shorter, max(shorter, int(shorter * height / width))), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((max(shorter, int(shorter * width / height)), shorter), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def resized_side(size: int) -> int:
    """Pixels of the shorter side that an image is brought to before its middle of `size` pixels is cut out."""
    return round(size * 8 / 7)


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of a strip: resized whole, one of 1 x 5000 pixels would take a gigabyte."""
    width, height = image.size
    most = MAX_SIDE_RATIO_SEEN_WHOLE * min(width, height)
    if max(width, height) <= most:
        return image
    w, h = min(width, most), min(height, most)
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _factor(strength: float, generator: np.random.Generator) -> float:
    return generator.uniform(max(0.0, 1 - strength), 1 + strength)
