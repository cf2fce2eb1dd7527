"""Operations on arrays and tensors: DINO features of images, and what is computed from them.

    from dino_ops import Extractor
    features = Extractor("dino_vits16")("photo.jpg")
    features.descriptor          # (grid height, grid width, channels) float32

Importing the package loads neither torch nor timm: names below are resolved when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_ops.correspondences import Correspondences as Correspondences
    from dino_ops.correspondences import find_correspondences as find_correspondences
    from dino_ops.cosegmentation import ForegroundModel as ForegroundModel
    from dino_ops.cosegmentation import fit_foreground as fit_foreground
    from dino_ops.cosegmentation import foreground_patches as foreground_patches
    from dino_ops.descriptors import binned_similarity as binned_similarity
    from dino_ops.descriptors import log_bin as log_bin
    from dino_ops.errors import ImageError as ImageError
    from dino_ops.errors import ModelError as ModelError
    from dino_ops.extractor import Extractor as Extractor
    from dino_ops.extractor import ImageFeatures as ImageFeatures
    from dino_ops.images import ImageSpec as ImageSpec
    from dino_ops.images import PreparedImage as PreparedImage
    from dino_ops.images import decode_image as decode_image
    from dino_ops.images import patch_centres as patch_centres
    from dino_ops.images import prepare_image as prepare_image
    from dino_ops.mask_refinement import grabcut as grabcut
    from dino_ops.models import ModelInfo as ModelInfo
    from dino_ops.models import describe as describe
    from dino_ops.parts import PartModel as PartModel
    from dino_ops.parts import fit_common_parts as fit_common_parts
    from dino_ops.parts import fit_parts as fit_parts
    from dino_ops.parts import smooth_parts as smooth_parts
    from dino_ops.pca import PCA as PCA
    from dino_ops.pca import fit_pca as fit_pca
    from dino_ops.pca import pca_colours as pca_colours

_HOME = {
    "Extractor": "extractor",
    "ImageFeatures": "extractor",
    "ImageError": "errors",
    "ModelError": "errors",
    "ImageSpec": "images",
    "PreparedImage": "images",
    "decode_image": "images",
    "patch_centres": "images",
    "prepare_image": "images",
    "ModelInfo": "models",
    "describe": "models",
    "PCA": "pca",
    "fit_pca": "pca",
    "pca_colours": "pca",
    "binned_similarity": "descriptors",
    "log_bin": "descriptors",
    "Correspondences": "correspondences",
    "find_correspondences": "correspondences",
    "ForegroundModel": "cosegmentation",
    "fit_foreground": "cosegmentation",
    "foreground_patches": "cosegmentation",
    "PartModel": "parts",
    "fit_parts": "parts",
    "fit_common_parts": "parts",
    "smooth_parts": "parts",
    "grabcut": "mask_refinement",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dino_ops' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dino_ops.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
