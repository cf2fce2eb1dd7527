"""Every setting that decides values reaches what computes them: the extractor of a worker, and pictures read again."""

from __future__ import annotations

from typing import Any

import pytest

from dino_ops import extractor as extractors
from pipelines.features.extractor import ExtractorSetup, make_extractor
from pipelines.features.image_spec import image_spec
from pipelines.settings.loading import load_config
from pipelines.settings.sections import Config, FeatureSettings, ImageSettings

# setting -> (what is given for it, the extractor's argument, its value)
SETTINGS: dict[str, tuple[str, str, Any]] = {
    "image.shorter_side": ("96", "shorter_side", 96),
    "image.size": ("[64, 96]", "size", (64, 96)),
    "image.native": ("true", "native", True),
    "image.resample": ("bicubic", "resample", "bicubic"),
    "image.crop": ("patch", "crop", "patch"),
    "image.max_pixels": ("1000", "max_pixels", 1000),
    "image.mean": ("[0.1, 0.2, 0.3]", "mean", (0.1, 0.2, 0.3)),
    "image.std": ("[0.1, 0.2, 0.3]", "std", (0.1, 0.2, 0.3)),
    "features.layer": ("3", "layer", 3),
    "features.facet": ("token", "facet", "token"),
    "features.extra": ("[{layer: 9, facet: query}]", "extra", [(9, "query")]),
    "features.stride": ("8", "stride", 8),
    "features.final_norm": ("true", "final_norm", True),
    "features.position": ("timm", "position", "timm"),
    "features.saliency_heads": ("[0, 2]", "saliency_heads", (0, 2)),
    "features.channel_order": ("dim_major", "channel_order", "dim_major"),
    "features.saliency": ("false", "saliency", False),
    "features.embedding": ("false", "embedding", False),
    "store.patches": ("none", "descriptors", False),
    "model.precision": ("float32", "precision", "float32"),
    "model.compile": ("true", "compile", True),
    "run.batch_size": ("3", "batch_size", 3),
}
TOGETHER = {"image.size": {"shorter_side": None}, "image.native": {"shorter_side": None}}
"""What else the extractor is given for a setting that replaces another one."""


def settings(*overrides: str) -> Config:
    return load_config([], ["model.name=vit_tiny_patch16_224", "model.weights=random", *overrides])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the extractor of some settings is made with."""
    monkeypatch.setattr(extractors, "Extractor", lambda *arguments, **named: {"model": arguments, **named})

    def make(*overrides: str) -> dict[str, Any]:
        setup = ExtractorSetup("store", "r1", settings(*overrides), "cpu", "random:0", threads=0)
        return make_extractor(setup)

    return make


def test_no_setting_is_forgotten() -> None:
    sections = {"image": ImageSettings, "features": FeatureSettings}
    every = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert every <= SETTINGS.keys()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_reaches_the_extractor_and_changes_nothing_else(given: Any, setting: str) -> None:
    text, argument, value = SETTINGS[setting]
    before, after = given(), given(f"{setting}={text}")
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {argument, *TOGETHER.get(setting, {})}
    assert after[argument] == value
    assert TOGETHER.get(setting, {}).items() <= after.items()


def test_the_model_its_weights_and_the_device_are_those_of_the_setup(given: Any) -> None:
    assert given()["model"] == ("vit_tiny_patch16_224", "random") and given()["device"] == "cpu"


@pytest.mark.parametrize("size", [["image.shorter_side=96"], ["image.size=[64, 96]"], ["image.native=true"]])
def test_a_picture_that_is_read_again_is_sized_as_the_extractor_does(size: list[str]) -> None:
    config = settings(*size, "image.resample=bicubic", "image.crop=patch", "image.max_pixels=1000")
    image = config.image
    extractor = extractors.Extractor(
        "vit_tiny_patch16_224", "random", shorter_side=image.shorter_side, size=image.size, native=image.native,
        resample="bicubic", crop="patch", max_pixels=1000, device="cpu",
    )  # fmt: skip
    assert image_spec(config) == extractor.image_spec
