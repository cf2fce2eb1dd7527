"""The dense CRF against mean field inference over all pairs of pixels, and against pydensecrf where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from dino_ops import dense_crf
from dino_ops.dense_crf import PUBLISHED, CRFSettings, backend_in_use, crf_labels


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def exact_labels(energies: np.ndarray, rgb: np.ndarray, settings: CRFSettings = PUBLISHED) -> np.ndarray:
    """Every pair of pixels, in float64."""
    height, width = rgb.shape[:2]
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(float)
    red, green, blue = rgb.reshape(-1, 3).T / settings.rgb_sigma
    smooth = np.stack([x, y], axis=1) / settings.smooth_sigma
    colour = np.stack([x / settings.colour_sigma, y / settings.colour_sigma, red, green, blue], axis=1)
    couplings = np.zeros((height * width, height * width))
    for weight, features in ((settings.smooth_weight, smooth), (settings.colour_weight, colour)):
        lengths = (features**2).sum(axis=1)
        kernel = np.exp(-(lengths[:, None] + lengths - 2 * features @ features.T) / 2)
        scale = 1 / np.sqrt(kernel.sum(axis=1))
        couplings += weight * scale[:, None] * kernel * scale
    unary = -energies.reshape(len(energies), -1).T.astype(float)
    probabilities = softmax(unary)
    for _ in range(settings.iterations):
        probabilities = softmax(unary + couplings @ probabilities)
    return probabilities.argmax(axis=1).reshape(height, width)


def smooth_energies(labels: int, height: int, width: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).random((labels, height, width))
    return np.stack([10 * gaussian_filter(one, 4) for one in noise])


@pytest.fixture(scope="module")
def small_photo(photo: Image.Image) -> np.ndarray:
    return np.array(photo.resize((60, 40), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("seed", range(2))
def test_all_pairs_of_pixels(small_photo: np.ndarray, seed: int) -> None:
    energies = smooth_energies(4, 40, 60, seed)
    exact = exact_labels(energies, small_photo)
    ours = crf_labels(energies, small_photo, backend="numpy")
    assert ours.dtype == np.int32
    assert (energies.argmin(axis=0) == exact).mean() < 0.8  # the CRF has changed much
    assert (ours == exact).mean() >= 0.97


def test_labels_follow_colours() -> None:
    """Pixels between two certain regions go to either by their colour, and without colours by the nearer region."""
    rgb = np.zeros((30, 40, 3), np.uint8)
    rgb[:, 20:] = 200
    energies = np.zeros((2, 30, 40), np.float32)
    energies[0, :, 23:] = energies[1, :, :11] = 1.0
    edge = np.arange(40) >= 20
    labels = crf_labels(energies, rgb, CRFSettings(smooth_weight=0), backend="numpy")
    np.testing.assert_array_equal(labels, np.broadcast_to(edge, (30, 40)))
    flat = crf_labels(energies, np.zeros_like(rgb), backend="numpy")
    assert np.isin(np.abs(np.diff(flat, axis=1)).argmax(axis=1), (15, 16, 17)).all()


def test_few_pixels_and_labels() -> None:
    assert crf_labels(np.zeros((1, 3, 4)), np.zeros((3, 4, 3), np.uint8), backend="numpy").tolist() == [[0] * 4] * 3
    assert crf_labels(np.array([[[2.0]], [[1.0]]]), np.zeros((1, 1, 3), np.uint8), backend="numpy").tolist() == [[1]]


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"not \(2, 3, 4\) and \(4, 3, 3\)"):
        crf_labels(np.zeros((2, 3, 4)), np.zeros((4, 3, 3), np.uint8))


def test_which_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_crf, "find_spec", lambda name: None)
    assert backend_in_use("auto") == backend_in_use("numpy") == "numpy"
    with pytest.raises(ValueError, match=r"pip install 'dinoray\[crf\]'"):
        backend_in_use("pydensecrf")
    monkeypatch.setattr(dense_crf, "find_spec", lambda name: object())
    assert backend_in_use("auto") == backend_in_use("pydensecrf") == "pydensecrf"
    with pytest.raises(ValueError, match="not 'cuda'"):
        backend_in_use("cuda")


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_pydensecrf_gives_the_same_labels(photo: Image.Image, labels: int) -> None:
    pytest.importorskip("pydensecrf", reason="the extra crf is not installed")
    rgb = np.array(photo.resize((180, 120), Image.Resampling.LANCZOS))
    energies = smooth_energies(labels, 120, 180, seed=5)
    assert backend_in_use("auto") == "pydensecrf"
    ours = crf_labels(energies, rgb, backend="numpy")
    assert len(np.unique(ours)) == labels
    assert (ours == crf_labels(energies, rgb)).mean() >= 0.995
