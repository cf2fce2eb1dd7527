"""Shared fixtures: small networks of every family with weights that matter, photos, and the optional test data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from repository import ROOT
from torch import nn

from dino_ops import Extractor, ImageFeatures

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # DINO: learnt positions with the class token's own
    "dino": ("vit_small_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3}),
    # DINOv2: LayerScale, patch 14
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 70, "embed_dim": 48, "num_heads": 3, "init_values": 0.5}),
    # DINOv2 with registers, which have no positions
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", {"img_size": 70, "embed_dim": 48, "num_heads": 3}),
    # DINOv2 giant's gated MLP
    "dinov2_swiglu": ("vit_giant_patch14_dinov2", {"img_size": 70, "embed_dim": 48, "num_heads": 3}),
    # DINOv3: rotary positions, registers, no qkv bias
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, "embed_dim": 48, "num_heads": 3}),
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {"img_size": 64, "embed_dim": 48, "num_heads": 3}),
    "dinov3_plus": ("vit_small_plus_patch16_dinov3", {"img_size": 64, "embed_dim": 48, "num_heads": 3}),
    # normalised queries and keys
    "qk_norm": ("vit_small_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "qk_norm": True}),
    # normalised and gated attention output, normalised input, no positions for the class token
    "gated": (
        "vit_small_patch16_224",
        {
            "img_size": 64,
            "embed_dim": 48,
            "num_heads": 3,
            "no_embed_class": True,
            "scale_attn_norm": True,
            "pre_norm": True,
        },
    ),
    # EVA-02: separate projections, rotary and learnt positions, final norm behind the pool
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 70, "embed_dim": 48, "num_heads": 3}),
}
DEPTH = 3


def build_network(family: str) -> nn.Module:
    """A network of three blocks; every parameter is random, so nothing (LayerScale, biases) is hidden by its start."""
    architecture, options = FAMILIES[family]
    network = timm.create_model(architecture, depth=DEPTH, num_classes=0, dynamic_img_size=True, **options)
    if family == "gated":  # timm has the gate, but no model argument for it
        for block in network.blocks:
            block.attn.gate = nn.Linear(48, 48)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return network.eval().requires_grad_(False)


@pytest.fixture
def make_network() -> Callable[[str], nn.Module]:
    return build_network


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def network(family: str) -> nn.Module:
    return build_network(family)


@pytest.fixture
def pixels_for() -> Callable[..., torch.Tensor]:
    """Normalised pixels (B, 3, H, W), the same for the same sizes."""

    def make(height: int, width: int, batch: int = 2) -> torch.Tensor:
        return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))

    return make


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A cat, 451 x 300 pixels."""
    return Image.fromarray(skimage.data.chelsea())


@pytest.fixture
def noise_map() -> Callable[..., np.ndarray]:
    """Random feature maps (height, width, C) float32."""

    def make(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((height, width, channels)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real images and outputs of the published code, which are not part of the repository."""
    beside = ROOT.resolve().parent / "shared" / "data"
    folder = Path(os.environ.get("DINORAY_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set DINORAY_TEST_DATA")
    return folder


@dataclass
class CowSet:
    """Six photos, their features, and what the published code makes of them."""

    features: list[ImageFeatures]
    pixels: list[np.ndarray]  # (H, W, 3) uint8, as the model saw them
    settings: dict[str, Any]
    masks: list[np.ndarray]  # (H, W) bool
    parts: list[np.ndarray]  # (H, W), -1 for background

    @property
    def descriptors(self) -> list[np.ndarray]:
        return [image.descriptor for image in self.features if image.descriptor is not None]

    @property
    def saliency(self) -> list[np.ndarray | None]:
        return [image.saliency for image in self.features]

    @property
    def fitting(self) -> dict[str, Any]:
        """The published run's settings, as fit_foreground names them."""
        return {
            "elbow": self.settings["elbow"],
            "votes_percentage": self.settings["votes_percentage"],
            "saliency_threshold": self.settings["thresh"],
            "sample_interval": self.settings["sample_interval"],
        }


@pytest.fixture(scope="session")
def cows(data_dir: Path) -> CowSet:
    listed = json.loads((data_dir / "golden" / "cosegmentation.json").read_text())
    arrays = np.load(data_dir / "golden" / "cosegmentation.npz")
    settings = listed["parts"]
    assert listed["cosegmentation"].items() <= settings.items()
    assert not settings["low_res_saliency_maps"]
    extractor = Extractor(
        "deit_tiny_patch16_224",
        data_dir / "weights" / "deit_tiny_patch16_224_state_dict.pth",
        layer=settings["layer"],
        facet=settings["facet"],
        stride=settings["stride"],
        shorter_side=settings["load_size"],
        device="cpu",
    )
    prepared = [extractor.prepare(data_dir / image) for image in listed["images"]]
    masks, parts = [], []
    for number in range(len(prepared)):
        height, width = arrays[f"mask_{number}_hw"]
        masks.append(np.unpackbits(arrays[f"mask_{number}"], count=height * width).reshape(height, width).astype(bool))
        labels = arrays[f"parts_{number}"].astype(np.int32)
        parts.append(np.where(labels == 255, -1, labels))
    return CowSet(extractor.extract(prepared), [one.pixels for one in prepared], settings, masks, parts)
