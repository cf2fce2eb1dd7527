"""Models by name: DINO, DINOv2 and DINOv3 under their authors' names, our own, anything else plain by its timm name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch

from dino_ops.backbone import Backbone, Position
from dino_ops.errors import ModelError
from dino_ops.hub import download_pretrained
from dino_ops.packaged import PACKAGED, packaged_weights
from dino_ops.weights import fit_weights, load_state_dict

SHORT_NAMES: dict[str, str] = {
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_vitg14": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3_vits16": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3.lvd1689m",
    "dinov3_vitb16": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3_vitl16": "vit_large_patch16_dinov3.lvd1689m",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3.lvd1689m",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3.lvd1689m",
    # Of the timm names of a ViT-Ti/16, this one has ImageNet's mean and std.
    "dinoray_tiny": "deit_tiny_patch16_224",
}

# An unfit weights file is compared with these, besides the short names.
_COMMON_OTHERS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")


@dataclass(frozen=True)
class ModelInfo:
    """Facts of a model that need no weights. mean and std are per RGB channel, of values in 0..1."""

    name: str
    timm_name: str
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    num_prefix_tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def timm_name(name: str) -> str:
    """The timm name of a short or timm name. Raises ModelError naming the nearest known names."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    architecture = name.partition(".")[0]
    if timm.is_model(architecture) and (name == architecture or name in timm.list_models(pretrained=True)):
        return name
    known = [*SHORT_NAMES, *timm.list_models(), *timm.list_models(pretrained=True)]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}" if nearest else f"use a timm name or {', '.join(SHORT_NAMES)}"
    raise ModelError(f"there is no model {name!r}: {hint}")


@cache
def describe(name: str) -> ModelInfo:
    """Facts of a model by short or timm name, in milliseconds: nothing is allocated, nothing is downloaded."""
    with torch.device("meta"):
        backbone = Backbone(_build(timm_name(name)), name)
    return ModelInfo(
        name=name,
        timm_name=timm_name(name),
        patch_size=backbone.patch_size,
        embed_dim=backbone.embed_dim,
        depth=backbone.depth,
        num_heads=backbone.num_heads,
        num_prefix_tokens=backbone.num_prefix_tokens,
        mean=backbone.mean,
        std=backbone.std,
    )


def create_model(
    name: str,
    weights: str | PathLike[str] = "pretrained",
    seed: int = 0,
    stride: int | None = None,
    position: Position = "dino",
) -> Backbone:
    """Build a model and give it weights; it is on the CPU, in float32, in evaluation mode, without gradients.

    name: short or timm name. weights: "pretrained" (from the hub or its local cache; dinoray_tiny's from this package),
    "random" (the same for the same seed in every process), or the path of a .pth, .pt, .bin or .safetensors file.
    stride, position: see Backbone.

    Random state of the caller is left as it was. Raises ModelError for anything that does not fit.
    """
    full_name = timm_name(name)
    if weights == "random":
        with _seeded(seed):
            return Backbone(_build(full_name), name, stride, position)
    path = _pretrained(name, full_name) if weights == "pretrained" else weights
    state = load_state_dict(path)
    with torch.device("meta"):
        template = _build(full_name)
    fitted = fit_weights(state, template, name=name, path=path, candidates=_candidates)
    with _seeded(seed):
        vit = _build(full_name, **fitted.build_options)
    vit.load_state_dict(fitted.state, strict=True)
    return Backbone(vit, name, stride, position)


def _pretrained(name: str, full_name: str) -> Path:
    return packaged_weights(name) if name in PACKAGED else download_pretrained(full_name)


def _build(full_name: str, **options: Any) -> torch.nn.Module:
    return timm.create_model(full_name, pretrained=False, num_classes=0, **options)


def _candidates() -> Iterator[tuple[str, torch.nn.Module]]:
    """Known models without storage, to compare an unfit weights file with. Packaged ones are not what people bring."""
    with torch.device("meta"):
        for name in (*(name for name in SHORT_NAMES if name not in PACKAGED), *_COMMON_OTHERS):
            yield name, _build(timm_name(name))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
