"""dinoray_tiny: found in the package and nowhere else, carried by wheels, and what its file and card must be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from packaged_files import CARD, WEIGHTS, stand_in
from repository import ROOT
from safetensors.torch import load_file

from dino_ops import hub, packaged
from dino_ops.errors import ModelError
from dino_ops.models import create_model, describe

LARGEST = 12_000_000  # bytes


def test_architecture_and_statistics_it_was_trained_with() -> None:
    info = describe("dinoray_tiny")
    assert (info.patch_size, info.embed_dim, info.depth, info.num_heads, info.num_prefix_tokens) == (16, 192, 12, 3, 1)
    assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_pretrained_is_the_packaged_file_and_never_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_hub(*_: object) -> None:
        raise AssertionError("the hub was asked")

    for name in ("try_to_load_from_cache", "hf_hub_download", "_why_unreachable"):
        monkeypatch.setattr(hub, name, no_hub)
    path = stand_in(tmp_path, seed=3)
    monkeypatch.setattr(packaged, "FOLDER", tmp_path)
    backbone = create_model("dinoray_tiny")
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.forward_features(pixels)[:, 0]
    assert torch.allclose(backbone.class_tokens(pixels), expected, atol=1e-5)


def test_an_installation_without_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path)
    with pytest.raises(
        ModelError, match=r"lacks the weights of dinoray_tiny .*: install it again, or give model\.weights="
    ):
        create_model("dinoray_tiny")
    create_model("dinoray_tiny", "random")


def test_a_file_of_the_same_network_is_not_called_dinoray_tiny(tmp_path: Path) -> None:
    """It might be anybody's DeiT: the name that people know it by is offered."""
    path = stand_in(tmp_path, seed=1)
    with pytest.raises(ModelError, match=r"do not fit dino_vits16 .* looks like deit_tiny_patch16_224,"):
        create_model("dino_vits16", path)


def test_a_wheel_carries_weights_and_card(tmp_path: Path) -> None:
    """Built from a copy of the sources, with the setuptools that torch brings along; then imported from where it is."""
    source = tmp_path / "source"
    for folder in ("dino_ops", "pipelines"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, source / file)
    carried = source / "dino_ops" / "pretrained"
    carried.mkdir(exist_ok=True)
    for name in (WEIGHTS.name, CARD.name, "notes.txt"):
        (carried / name).write_text(name)
    build = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('.')"]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = source.glob("dinoray-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    found = {path.name for path in (installed / "dino_ops" / "pretrained").iterdir()}
    assert found == {WEIGHTS.name, CARD.name}, "notes.txt is not declared"
    script = "from dino_ops.packaged import packaged_weights; print(packaged_weights('dinoray_tiny'))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).samefile(installed / "dino_ops" / "pretrained" / WEIGHTS.name)


def test_the_file_is_small_and_in_half_precision_under_timms_names() -> None:
    assert WEIGHTS.stat().st_size <= LARGEST
    state = load_file(WEIGHTS)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


def test_the_weights_are_trained() -> None:
    """Biases begin at 0 and norms at 1: none of them is left so."""
    initial = create_model("dinoray_tiny", "random").vit.state_dict()
    trained = create_model("dinoray_tiny").vit.state_dict()
    assert [name for name, tensor in trained.items() if torch.equal(tensor, initial[name])] == []


def test_the_card_names_data_recipe_accuracy_and_limits() -> None:
    card = CARD.read_text()
    for word in ("Imagenette", "9,469", "dinoray train", "ViT-Ti/16", "k-NN", "PF-WILLOW", "MSRC", "random", "not for"):
        assert word in card, word
    assert re.search(r"k-NN.*\b\d{2}(\.\d+)? ?%|k-NN.*\b0\.\d{2,}", card), "an accuracy"
