"""Point correspondence on real photographs: PCK of PF-WILLOW from stored descriptors of a real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.evaluate import pck
from pipelines.extract import job as extract
from pipelines.settings.loading import load_config


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_figures_are_those_of_the_published_descriptors(data: Path, tmp_path: Path) -> None:
    """What the same protocol gives on the published extractor's descriptors: PCK@0.1, 5 classes of 10 images."""
    settings = [
        "model.name=deit_tiny_patch16_224",
        f"model.weights={data / 'weights' / 'deit_tiny_patch16_224_state_dict.pth'}",
        "model.precision=float32",
        "features.stride=8",
        "features.layer=9",
        "features.extra=[{layer: 6, facet: token}]",
    ]
    store = str(tmp_path / "store")
    extracted = extract.run(load_config([], settings), input=str(data / "pf-willow"), store=store)
    assert (extracted.extracted, extracted.failed) == (50, 0)
    expected = {
        ("descriptor", "true"): {"keypoint_box": 0.558, "image": 0.682},
        ("descriptor", "false"): {"keypoint_box": 0.319, "image": 0.433},
        ("descriptor_token6", "false"): {"keypoint_box": 0.399, "image": 0.520},
    }
    for (column, binned), figures in expected.items():
        config = load_config([], [f"evaluate.descriptor={column}", f"evaluate.binned={binned}"])
        result = pck.run(config, store=store, annotations=str(data / "pf-willow"))
        assert (result.pairs, result.points) == (450, 4500)
        overall = {row["threshold"]: row for row in result.scores if row["category"] == "all"}
        for threshold, figure in figures.items():
            row = overall[threshold]
            assert row["per_point"][1] == pytest.approx(figure, abs=1e-3), (column, binned, threshold)
            assert row["per_pair"] == row["per_point"], "ten points in every pair"
