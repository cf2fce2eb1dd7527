"""Weights files in every layout that authors publish, built from a timm model and read back."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from dino_ops.errors import ModelError
from dino_ops.weights import fit_weights, load_state_dict

State = dict[str, torch.Tensor]
LAYOUTS: dict[str, Callable[[State], Any]] = {
    "backbone": lambda state: state,
    "timm with a head": lambda state: state | {"head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)},
    "wrapped in model": lambda state: {"model": state, "epoch": 3},
    "wrapped in state_dict": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "wrapped in model_ema": lambda state: {"model": different(state), "model_ema": state},
    "DINO training": lambda state: {
        "student": {f"module.backbone.{key}": value for key, value in different(state).items()},
        "teacher": {f"backbone.{key}": value for key, value in state.items()}
        | {"head.mlp.0.weight": torch.ones(4, 48), "head.last_layer.weight_v": torch.ones(4, 4)},
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 100,
    },
    "DINO training, student only": lambda state: {
        "student": {f"module.backbone.{key}": value for key, value in state.items()}
    },
    "DINOv2 training": lambda state: {
        "model": {f"student.backbone.{key}": value for key, value in different(state).items()}
        | {f"teacher.backbone.{key}": value for key, value in state.items()}
        | {"teacher.dino_head.mlp.0.weight": torch.ones(4, 48), "teacher.ibot_head.mlp.0.bias": torch.ones(4)}
    },
    "chunked blocks": lambda state: chunked(state),
    "half precision": lambda state: {key: value.half() for key, value in state.items()},
}


def different(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


def chunked(state: State) -> State:
    """DINOv2's training layout: chunk number, then the block's own number."""
    return {
        key if not key.startswith("blocks.") else f"blocks.{int(key.split('.')[1]) // 2}.{key[len('blocks.') :]}": value
        for key, value in state.items()
    }


def as_dinov2_names(network: Any) -> State:
    """The inverse of what reading does, for a timm DINOv2 network."""
    state = dict(network.state_dict())
    state["mask_token"] = torch.zeros(1, 48)
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        own_position = torch.full((1, 1, 48), 0.25)
        state["cls_token"] = state["cls_token"] - own_position
        state["pos_embed"] = torch.cat([own_position, state["pos_embed"]], dim=1)
    names = {".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."} if "giant" in architecture(network) else {}
    return {rename(key, names): value for key, value in state.items()}


def as_dinov3_names(network: Any, key_bias: float = 3.0) -> State:
    """The inverse of what reading does, for a timm DINOv3 network. The key third of the bias is masked, not zero."""
    state = dict(network.state_dict())
    width = state["cls_token"].shape[-1]
    for i in range(len(network.blocks)):
        query = state.pop(f"blocks.{i}.attn.q_bias", torch.zeros(width))
        value = state.pop(f"blocks.{i}.attn.v_bias", torch.zeros(width))
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([query, torch.full((width,), key_bias), value])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
    state |= {"mask_token": torch.zeros(1, width), "rope_embed.periods": torch.ones(4)}
    names = {"reg_token": "storage_tokens", ".gamma_1": ".ls1.gamma", ".gamma_2": ".ls2.gamma"}
    names |= {".mlp.fc1_g.": ".mlp.w1.", ".mlp.fc1_x.": ".mlp.w2."}
    if "plus" in architecture(network):
        names[".mlp.fc2."] = ".mlp.w3."
    return {rename(key, names): value for key, value in state.items()}


def architecture(network: Any) -> str:
    return network.pretrained_cfg["architecture"]


def rename(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


def same_state(ours: State, expected: State, tolerance: float = 0) -> None:
    assert set(ours) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=tolerance, atol=tolerance)


def read_back(content: Any, template: nn.Module, path: Path) -> Any:
    torch.save(content, path)
    return fit_weights(load_state_dict(path), template, name="tiny", path=path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(make_network: Callable, tmp_path: Path, layout: str) -> None:
    network = make_network("dinov2")
    fitted = read_back(LAYOUTS[layout](network.state_dict()), network, tmp_path / "weights.pth")
    same_state(fitted.state, network.state_dict(), tolerance=2e-3 if layout == "half precision" else 0)
    assert fitted.build_options == {}
    assert all(tensor.dtype == torch.float32 for tensor in fitted.state.values())


def test_safetensors(make_network: Callable, tmp_path: Path) -> None:
    network = make_network("dino")
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    state = load_state_dict(tmp_path / "weights.safetensors")
    same_state(fit_weights(state, network, "tiny", "weights").state, network.state_dict())


@pytest.mark.parametrize("family", ["dinov2", "dinov2_reg", "dinov2_swiglu"])
def test_dinov2_names(make_network: Callable, tmp_path: Path, family: str) -> None:
    network = make_network(family)
    fitted = read_back(as_dinov2_names(network), network, tmp_path / "weights.pth")
    same_state(fitted.state, network.state_dict(), tolerance=1e-6)


@pytest.mark.parametrize("family", ["dinov3", "dinov3_qkvb", "dinov3_plus"])
def test_dinov3_names(make_network: Callable, tmp_path: Path, family: str) -> None:
    network = make_network(family)
    fitted = read_back(as_dinov3_names(network), network, tmp_path / "weights.pth")
    same_state(fitted.state, network.state_dict())
    assert fitted.build_options == {}


def test_dinov3_biases_that_the_model_lacks_are_built_in(make_network: Callable, tmp_path: Path) -> None:
    with_biases, without = make_network("dinov3_qkvb"), make_network("dinov3")
    fitted = read_back(as_dinov3_names(with_biases), without, tmp_path / "weights.pth")
    assert fitted.build_options == {"qkv_bias": True}
    same_state(fitted.state, with_biases.state_dict())


def test_dinov3_bias_on_keys_is_refused(make_network: Callable, tmp_path: Path) -> None:
    network = make_network("dinov3_qkvb")
    state = {key: value for key, value in as_dinov3_names(network).items() if not key.endswith("bias_mask")}
    with pytest.raises(ModelError, match="bias on attention keys"):
        read_back(state, network, tmp_path / "weights.pth")


def test_other_training_sizes_are_accepted(make_network: Callable, tmp_path: Path) -> None:
    network = make_network("dino")
    state = dict(network.state_dict())
    state["pos_embed"] = torch.randn(1, 1 + 7 * 7, 48)
    fitted = read_back(state, network, tmp_path / "weights.pth")
    assert fitted.build_options == {"img_size": 112}
    assert fitted.state["pos_embed"] is not None and torch.equal(fitted.state["pos_embed"], state["pos_embed"])


def test_mismatches_are_told(make_network: Callable, tmp_path: Path) -> None:
    network = make_network("dino")
    others = {"patch 8": timm.create_model("vit_small_patch8_224", depth=3, embed_dim=48, num_heads=3, num_classes=0)}
    path = tmp_path / "weights.pth"
    torch.save(others["patch 8"].state_dict(), path)
    with pytest.raises(ModelError) as told:
        fit_weights(load_state_dict(path), network, "tiny", path, lambda: [("tiny", network), *others.items()])
    message = str(told.value)
    assert str(path) in message and "do not fit tiny" in message
    assert "patch_embed.proj.weight is (48, 3, 8, 8) in the file and (48, 3, 16, 16) in the model" in message
    assert "it looks like patch 8" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "norm.weight"}, "missing, such as norm.weight"),
        (lambda state: state | {"surprise": torch.ones(1)}, "have no place, such as surprise"),
        (lambda state: state | {"reg_token": torch.ones(1, 4, 48)}, "have no place, such as reg_token"),
        (lambda state: state | {"pos_embed": torch.ones(1, 12, 48)}, r"pos_embed is \(1, 12, 48\) in the file"),
        (lambda state: {"epoch": 3}, "holds no tensors"),
        (lambda state: {"a.weight": torch.ones(1)}, "its keys begin a.weight"),
        (lambda state: [1, 2], "holds no tensors"),
    ],
)
def test_unfit_files(make_network: Callable, tmp_path: Path, change: Callable, message: str) -> None:
    network = make_network("dino")
    with pytest.raises(ModelError, match=message):
        read_back(change(dict(network.state_dict())), network, tmp_path / "weights.pth")


class RunsWhenLoaded:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"patch_embed.proj.weight": torch.ones(1), "evil": RunsWhenLoaded(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"was refused .* could run code"):
        load_state_dict(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # so the trap was a real one


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half a zip file"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        load_state_dict(tmp_path / name)


def test_absent_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(ModelError, match="there is no weights file"):
            load_state_dict(path)
