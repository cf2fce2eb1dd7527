"""Against outputs of the published extractor on real photographs with real weights (DeiT-Ti)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_ops import Extractor, ImageFeatures, binned_similarity

CASES = range(10)


class Golden:
    """The golden file, and our features under the same settings, extracted once."""

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir
        self.index = json.loads((data_dir / "golden" / "descriptors.json").read_text())
        self.arrays = np.load(data_dir / "golden" / "descriptors.npz")
        self.features = cache(self._features)
        self._extractor = cache(self._make_extractor)

    def images_of(self, case: int) -> list[dict[str, Any]]:
        return [entry for entry in self.index["cases"] if entry["case"] == case]

    def _features(self, case: int, image: int) -> ImageFeatures:
        (entry,) = [entry for entry in self.images_of(case) if entry["image"] == image]
        return self._extractor(json.dumps(entry["settings"]))(self.folder / entry["file"])

    def _make_extractor(self, settings_json: str) -> Extractor:
        settings = json.loads(settings_json)
        load_size = settings["load_size"]
        return Extractor(
            "deit_tiny_patch16_224",
            self.folder / "weights" / self.index["weights"],
            layer=settings["layer"],
            facet=settings["facet"],
            stride=settings["stride"],
            channel_order="dim_major",
            position="dino",
            native=load_size is None,
            size=tuple(load_size) if isinstance(load_size, list) else None,
            shorter_side=load_size if isinstance(load_size, int) else None,
        )


@pytest.fixture(scope="module")
def golden(data_dir: Path) -> Golden:
    return Golden(data_dir)


def test_every_case_is_tested(golden: Golden) -> None:
    assert {entry["case"] for entry in golden.index["cases"]} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_descriptors_and_saliency(golden: Golden, case: int) -> None:
    for entry in golden.images_of(case):
        ours = golden.features(case, entry["image"])
        prefix = f"{case}_{entry['image']}"
        assert [*ours.y.shape] == entry["grid"]
        assert [ours.model_height, ours.model_width] == entry["input_hw"]
        descriptors = ours.binned() if entry["settings"]["bin"] else ours.descriptor
        assert descriptors is not None and ours.saliency is not None
        picked = descriptors.reshape(-1, descriptors.shape[-1])[golden.arrays[f"{prefix}_index"]]
        expected = golden.arrays[f"{prefix}_descriptor"]
        assert np.linalg.norm(picked - expected) <= 1e-4 * np.linalg.norm(expected)
        np.testing.assert_allclose(ours.saliency.ravel(), golden.arrays[f"{prefix}_saliency"], atol=1e-3)


@pytest.mark.parametrize("image", range(4))
def test_embedding(golden: Golden, image: int) -> None:
    ours = golden.features(0, image).embedding
    np.testing.assert_allclose(ours, golden.arrays[f"embedding_{image}"], atol=1e-3)


def test_binned_similarity_of_the_binned_case(golden: Golden) -> None:
    a, b = golden.features(6, 0).descriptor, golden.features(6, 1).descriptor
    assert a is not None and b is not None
    rows, columns = golden.arrays["6_0_index"], golden.arrays["6_1_index"]
    binned_a, binned_b = golden.arrays["6_0_descriptor"], golden.arrays["6_1_descriptor"]
    expected = (binned_a @ binned_b.T) / np.outer(np.linalg.norm(binned_a, axis=1), np.linalg.norm(binned_b, axis=1))
    np.testing.assert_allclose(binned_similarity(a, b)[np.ix_(rows, columns)], expected, atol=1e-4)
