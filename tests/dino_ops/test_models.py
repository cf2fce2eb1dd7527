"""Models by name, and how they come by their weights."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from dino_ops import hub
from dino_ops.errors import ModelError
from dino_ops.models import SHORT_NAMES, create_model, describe, timm_name
from dino_ops.packaged import PACKAGED

PATCH_DIM_DEPTH = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40), "h": (1280, 32), "7": (4096, 40)}


@pytest.mark.parametrize("name", [name for name in SHORT_NAMES if name not in PACKAGED])
def test_short_names_are_what_they_say(name: str) -> None:
    info = describe(name)
    family, size = name.split("_")[:2]
    assert info.timm_name in timm.list_models(pretrained=True)
    assert (info.embed_dim, info.depth) == PATCH_DIM_DEPTH[size.removeprefix("vit")[0]]
    assert info.patch_size == int(size.removesuffix("plus")[-2:].lstrip("sb"))
    assert info.num_prefix_tokens == (5 if family == "dinov3" or name.endswith("_reg") else 1)
    assert info.embed_dim // info.num_heads in (64, 128)
    assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_timm_names_pass_through() -> None:
    for name in ("deit_tiny_patch16_224", "vit_small_patch16_224.dino"):
        assert timm_name(name) == name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("dino_vit16", "dino_vits16"),
        ("vit_small_patch16_224.dinoo", "vit_small_patch16_224.dino"),
        ("???", "dino_vits8"),
    ],
)
def test_unknown_names(name: str, nearest: str) -> None:
    with pytest.raises(ModelError, match=nearest):
        timm_name(name)


def test_other_networks_are_refused() -> None:
    for name in ("resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_r_s16_p8_224"):
        with pytest.raises(ModelError, match=f"{name} is a .* not those of a plain Vision Transformer"):
            describe(name)


FINGERPRINT = """
import hashlib
from dino_ops.models import create_model
state = create_model("deit_tiny_patch16_224", "random", seed={seed}).vit.state_dict()
print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest())
"""


def test_random_weights_are_the_same_everywhere_and_leave_random_state_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    state = create_model("deit_tiny_patch16_224", "random", seed=5).vit.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    ours = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()

    def elsewhere(seed: int) -> str:
        script = FINGERPRINT.format(seed=seed)
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    assert elsewhere(5) == ours
    assert elsewhere(6) != ours


def test_weights_from_a_file(tmp_path: Path) -> None:
    """A file trained at another size gives a model with that size's positions, and the very same weights."""
    network = timm.create_model("deit_tiny_patch16_224", img_size=96, num_classes=10)
    torch.save({"model": network.state_dict()}, tmp_path / "weights.pth")
    backbone = create_model("deit_tiny_patch16_224", tmp_path / "weights.pth", stride=8)
    assert backbone.vit.pos_embed.shape == (1, 37, 192)
    assert backbone.stride == 8
    for key, tensor in backbone.vit.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[key]), key


def test_weights_of_another_known_model_are_recognised(tmp_path: Path) -> None:
    torch.save(create_model("dino_vits16", "random").vit.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"do not fit dino_vits8 .* looks like dino_vits16, so set model.name"):
        create_model("dino_vits8", tmp_path / "weights.pth")


def test_pretrained_without_network_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    with pytest.raises(ModelError, match=r"answer.*weights=/path/to/file, .*or model\.weights=random"):
        create_model("dino_vits16", "pretrained")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        create_model("dino_vits16", "pretrained")


def test_pretrained_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = create_model("deit_tiny_patch16_224", "random", seed=9)
    torch.save(original.vit.state_dict(), tmp_path / "pytorch_model.bin")
    cached = {("timm/deit_tiny_patch16_224.fb_in1k", "pytorch_model.bin"): str(tmp_path / "pytorch_model.bin")}
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *where: cached.get(where))
    loaded = create_model("deit_tiny_patch16_224", "pretrained")
    assert torch.equal(loaded.vit.blocks[5].mlp.fc1.weight, original.vit.blocks[5].mlp.fc1.weight)


def test_a_hub_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: str) -> str:
        raise TimeoutError

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "_why_unreachable", lambda: None)
    monkeypatch.setattr(hub, "hf_hub_download", silent)
    with pytest.raises(ModelError, match=r"cannot be downloaded from .* \(TimeoutError\)"):
        create_model("deit_tiny_patch16_224", "pretrained")


def test_models_without_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"has no published weights: give .* or model\.weights=random"):
        create_model("vit_base_patch16_plus_240", "pretrained")
