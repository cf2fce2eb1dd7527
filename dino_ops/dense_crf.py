"""A dense conditional random field: labels of pixels that follow the image's colours.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (2011), with the
settings of the code published with "Deep ViT Features as Dense Visual Descriptors". The package pydensecrf2 (the extra
`crf`) does the same faster; without it the inference below is used, and the labels are the same but for few pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from typing import Literal

import numpy as np

from dino_ops.permutohedral import PermutohedralFilter

Backend = Literal["auto", "pydensecrf", "numpy"]


@dataclass(frozen=True)
class CRFSettings:
    """How strongly pixels want the labels of their neighbours.

    smooth_weight, smooth_sigma: of near pixels (standard deviation in pixels). colour_weight, colour_sigma, rgb_sigma:
    of near pixels of like colour (in pixels, and in grey levels of 0..255). iterations: of mean field inference.
    """

    smooth_weight: float = 50
    smooth_sigma: float = 3
    colour_weight: float = 15
    colour_sigma: float = 5
    rgb_sigma: float = 13
    iterations: int = 10


PUBLISHED = CRFSettings()


def crf_labels(
    energies: np.ndarray, rgb: np.ndarray, settings: CRFSettings = PUBLISHED, backend: Backend = "auto"
) -> np.ndarray:
    """The label of each pixel after inference: (H, W) int32; of equally probable labels the first.

    energies: (L, H, W), lower for labels that fit a pixel better. rgb: (H, W, 3) uint8.
    backend: "auto" is pydensecrf where it is installed and numpy elsewhere; see backend_in_use.
    """
    if energies.ndim != 3 or rgb.shape != (*energies.shape[1:], 3):
        raise ValueError(f"energies (L, H, W) of an image (H, W, 3), not {energies.shape} and {rgb.shape}")
    infer = _infer_pydensecrf if backend_in_use(backend) == "pydensecrf" else _infer_numpy
    probabilities = infer(energies.reshape(len(energies), -1).astype(np.float32), rgb, settings)  # (L, H * W)
    return probabilities.argmax(axis=0).astype(np.int32).reshape(rgb.shape[:2])


def backend_in_use(backend: Backend = "auto") -> Literal["pydensecrf", "numpy"]:
    """What crf_labels computes with. Raises ValueError for pydensecrf where it is not installed."""
    installed = find_spec("pydensecrf") is not None
    if backend == "auto":
        return "pydensecrf" if installed else "numpy"
    if backend == "pydensecrf" and not installed:
        raise ValueError("pydensecrf is not installed: pip install 'dinoray[crf]', or choose backend numpy")
    if backend not in ("pydensecrf", "numpy"):
        raise ValueError(f"backend is auto, pydensecrf or numpy, not {backend!r}")
    return backend


def _infer_numpy(energies: np.ndarray, rgb: np.ndarray, settings: CRFSettings) -> np.ndarray:
    height, width = rgb.shape[:2]
    y, x = np.mgrid[:height, :width].reshape(2, -1, 1)
    position = np.concatenate([x, y], axis=1)
    colour = rgb.reshape(-1, 3) / settings.rgb_sigma
    kernels = [
        (settings.smooth_weight, _Normalised(position / settings.smooth_sigma)),
        (settings.colour_weight, _Normalised(np.concatenate([position / settings.colour_sigma, colour], axis=1))),
    ]
    affinity = -np.ascontiguousarray(energies.T)  # (pixels, L)
    probabilities = _softmax(affinity)
    for _ in range(settings.iterations):
        messages = sum(weight * kernel(probabilities) for weight, kernel in kernels)
        probabilities = _softmax(affinity + messages)
    return probabilities.T


class _Normalised:
    """A Gaussian kernel K between pixels as N^-1/2 K N^-1/2, where N are its row sums."""

    def __init__(self, features: np.ndarray) -> None:
        self._filter = PermutohedralFilter(features)
        self._scale = 1 / np.sqrt(self._filter(np.ones((len(features), 1), np.float32)))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self._scale * self._filter(self._scale * values)


def _softmax(values: np.ndarray) -> np.ndarray:
    highest = reduce(np.maximum, values.T)  # faster than NumPy's own reduction over few columns
    exponentials = np.exp(values - highest[:, None])
    return exponentials / reduce(np.add, exponentials.T)[:, None]


def _infer_pydensecrf(energies: np.ndarray, rgb: np.ndarray, settings: CRFSettings) -> np.ndarray:
    from pydensecrf.densecrf import DenseCRF2D

    height, width = rgb.shape[:2]
    field = DenseCRF2D(width, height, len(energies))
    field.setUnaryEnergy(np.ascontiguousarray(energies))
    field.addPairwiseGaussian(sxy=settings.smooth_sigma, compat=settings.smooth_weight)
    field.addPairwiseBilateral(
        sxy=settings.colour_sigma,
        srgb=settings.rgb_sigma,
        rgbim=np.ascontiguousarray(rgb),
        compat=settings.colour_weight,
    )
    return np.array(field.inference(settings.iterations))
