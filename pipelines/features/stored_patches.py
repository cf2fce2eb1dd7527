"""Which patches of an image a store keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.settings.sections import StoreSettings

if TYPE_CHECKING:
    from dino_ops.extractor import ImageFeatures


def stored_patches(features: ImageFeatures, settings: StoreSettings) -> np.ndarray:
    """(n,) int64: indices, in raster order and ascending, of the patches that store.patches and store.every keep."""
    if settings.patches == "none":
        return np.zeros(0, np.int64)
    keep = np.arange(0, features.y.size, settings.every)
    if settings.patches == "salient":
        # the settings allow patches=salient only with saliency
        assert features.saliency is not None
        keep = keep[features.saliency.reshape(-1)[keep] > settings.salient_threshold]
    return keep
