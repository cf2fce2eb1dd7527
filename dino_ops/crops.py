"""Random crops, which make small sets of images large enough to cluster.

"Deep ViT Features as Dense Visual Descriptors", section 4.2 (part co-segmentation of few images).
"""

from __future__ import annotations

import numpy as np

CROP_SIDE_SHARE = 0.95


def random_crops(rgb: np.ndarray, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """`count` random crops of an image and as many of its mirror image, alternating: arrays (h, w, 3) uint8.

    rgb: (H, W, 3) uint8, resized as the model sees it. h and w are 95 % of its sides, rounded down, at least one
    pixel. As published, features are extracted from a crop resized like the images.
    """
    height, width = rgb.shape[:2]
    size_y, size_x = max(1, int(CROP_SIDE_SHARE * height)), max(1, int(CROP_SIDE_SHARE * width))
    crops = []
    for _ in range(count):
        for image in (rgb, rgb[:, ::-1]):
            top = generator.integers(0, height - size_y, endpoint=True)
            left = generator.integers(0, width - size_x, endpoint=True)
            crops.append(np.ascontiguousarray(image[top : top + size_y, left : left + size_x]))
    return crops
