"""Weights files of every usual layout to the names and shapes of the model they are for, or an error that says why not.

Understood: backbones as published by DINO, DINOv2 and DINOv3; training checkpoints of the same (the teacher is taken,
as its authors do); timm's own files; and any of these inside `model`, `state_dict` or `model_ema`.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models.eva import Eva
from torch import nn

from dino_ops.errors import ModelError

State = dict[str, torch.Tensor]

_WRAPPERS = ("teacher", "model_ema", "state_dict_ema", "state_dict", "model", "student")
_PREFIXES = ("teacher.", "student.", "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "vit.")

# Parts of checkpoints that no feature depends on: classification and projection heads, the masked patch's token,
# DINOv3's position periods (a constant) and the norm its 7B model keeps for local crops.
_NOT_BACKBONE = re.compile(
    r"(head|fc|head_dist|pre_logits|dino_head|ibot_head|last_layer|projectors|local_cls_norm)\.|mask_token$|rope_embed\."
)

# DINOv2 trains in chunks of blocks, numbered through.
_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_VIT_NAMES = {"register_tokens": "reg_token", ".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
_EVA_NAMES = {
    "storage_tokens": "reg_token",
    ".ls1.gamma": ".gamma_1",
    ".ls2.gamma": ".gamma_2",
    ".mlp.w1.": ".mlp.fc1_g.",
    ".mlp.w2.": ".mlp.fc1_x.",
    ".mlp.w3.": ".mlp.fc2.",
}


# A zip archive; before PyTorch 1.6 a pickle.
_PYTORCH_FILE_BEGINNINGS = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True)
class FittedWeights:
    """state: timm's names, float32, exactly the model's keys. build_options: for timm to build the model with."""

    state: State
    build_options: dict[str, Any]


def load_state_dict(path: str | PathLike[str]) -> State:
    """The backbone's tensors in a weights file, under the names the file gives them, in float32 on the CPU.

    Nothing in the file is ever executed: pickles may hold tensors and plain values only. Wrappers, prefixes and heads
    are removed. Raises ModelError if there is no such file, it is not a weights file, or holds no Vision Transformer.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}: give an existing .pth, .pt, .bin or .safetensors file")
    state = _without_prefixes(_unwrapped(_read(path)), path)
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if not _NOT_BACKBONE.match(name)
    }


def fit_weights(
    state: State,
    template: nn.Module,
    name: str,
    path: str | PathLike[str],
    candidates: Callable[[], Iterable[tuple[str, nn.Module]]] = lambda: (),
) -> FittedWeights:
    """Rename `state` for `template` (a timm model; the meta device will do) and check every key and shape.

    A position embedding of another square grid is accepted: build_options carry the image size that gives it. The
    same holds for DINOv3's query and value biases, which published files have and timm's plain variants leave out.

    name, path and candidates (known models as (name, template) pairs, made only on failure) serve the ModelError that
    is raised when anything is missing, left over or of another shape.
    """
    renamed = _timm_names(state, template, path)
    expected = {key: tuple(tensor.shape) for key, tensor in template.state_dict().items()}
    options = _biases_option(renamed, expected) | _image_size_option(renamed, expected, template)
    problems = _problems(renamed, expected)
    if problems:
        known = (other for other, model in candidates() if other != name and _fits(state, model, path))
        match = next(known, None)
        advice = f"it looks like {match}, so set model.name to that" if match else "give a file of that model"
        raise ModelError(f"the weights {path} do not fit {name} ({'; '.join(problems)}): {advice}")
    return FittedWeights({key: renamed[key] for key in expected}, options)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with path.open("rb") as file:
            beginning = file.read(16)
        if not beginning.startswith(_PYTORCH_FILE_BEGINNINGS):
            raise ModelError(
                f"the file {path} is not a weights file of PyTorch (it begins with {beginning!r}): give a .pth, .pt, "
                ".bin or .safetensors file"
            )
        # DINO's training checkpoints carry their command line, a Namespace: plain values, so allowed.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it refuses anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = "it holds objects other than tensors and plain values, which could run code when loaded"
        raise ModelError(f"the weights file {path} was refused ({reason}): save its state_dict alone") from e
    except ModelError:
        raise
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0].partition(". ")[0]
        raise ModelError(f"the weights file {path} cannot be read ({reason}): is it complete?") from e


def _unwrapped(content: Any) -> Any:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = inner
    return content


def _without_prefixes(content: Any, path: Path) -> State:
    entries = content if isinstance(content, Mapping) else {}
    state = {str(key): value for key, value in entries.items() if isinstance(value, torch.Tensor)}
    while not any(key.startswith("patch_embed.") for key in state):
        prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in state)), None)
        if prefix is None:
            found = f"its keys begin {', '.join(list(state)[:3])}" if state else "it holds no tensors"
            raise ModelError(f"the file {path} holds no Vision Transformer ({found}): give a backbone's weights")
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _timm_names(state: State, template: nn.Module, path: str | PathLike[str]) -> State:
    names = _EVA_NAMES if isinstance(template, Eva) else _VIT_NAMES
    renamed: State = {}
    for key, tensor in state.items():
        key = _CHUNKED_BLOCK.sub(r"blocks.\1.", key)
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    if isinstance(template, Eva):
        return _split_eva_biases(renamed, path)
    if "register_tokens" in state:
        # timm adds positions to patches only, so the class token's own position moves into the token.
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    return renamed


def _split_eva_biases(state: State, path: str | PathLike[str]) -> State:
    """DINOv3's qkv.bias, whose key third is masked to zero, as the query and value biases that timm has."""
    split: State = {}
    for key, tensor in state.items():
        if key.endswith(".qkv.bias_mask"):
            continue
        if not key.endswith(".attn.qkv.bias"):
            split[key] = tensor
            continue
        mask = state.get(f"{key}_mask")
        query, key_bias, value = (tensor if mask is None else tensor * mask.nan_to_num()).chunk(3)
        if key_bias.any():
            raise ModelError(f"the weights {path} have a bias on attention keys ({key}), which no known model has")
        split[key.replace("qkv.bias", "q_bias")] = query
        split[key.replace("qkv.bias", "v_bias")] = value
    return split


def _biases_option(state: State, expected: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Drop query and value biases that the model lacks if they are all zero; else have it built with them."""
    extra = [key for key in state if key.endswith((".attn.q_bias", ".attn.v_bias")) and key not in expected]
    if not extra:
        return {}
    if not any(state[key].any() for key in extra):
        for key in extra:
            del state[key]
        return {}
    expected.update({key: (expected[_qkv_weight(key)][0] // 3,) for key in extra if _qkv_weight(key) in expected})
    return {"qkv_bias": True}


def _qkv_weight(bias_key: str) -> str:
    return bias_key.rpartition(".")[0] + ".qkv.weight"


def _image_size_option(state: State, expected: dict[str, tuple[int, ...]], template: Any) -> dict[str, Any]:
    if "pos_embed" not in state or "pos_embed" not in expected or state["pos_embed"].shape == expected["pos_embed"]:
        return {}
    num_prefix = 0 if template.no_embed_class else template.num_prefix_tokens
    num_patches = state["pos_embed"].shape[1] - num_prefix
    side = math.isqrt(max(num_patches, 0))
    if side == 0 or side * side != num_patches:
        return {}
    expected["pos_embed"] = (1, num_prefix + num_patches, expected["pos_embed"][2])
    return {"img_size": side * template.patch_embed.patch_size[0]}


def _problems(state: State, expected: dict[str, tuple[int, ...]], shown: int = 3) -> list[str]:
    """What differs, in the order of the model's keys; only the first few of a kind, as thousands may differ."""
    differing = [key for key, shape in expected.items() if key in state and tuple(state[key].shape) != shape]
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    problems = [
        f"{key} is {tuple(state[key].shape)} in the file and {expected[key]} in the model" for key in differing[:shown]
    ]
    if missing:
        problems.append(f"{len(missing)} of the model's tensors are missing, such as {', '.join(missing[:shown])}")
    if unexpected:
        problems.append(f"{len(unexpected)} of the file's have no place, such as {', '.join(unexpected[:shown])}")
    return problems


def _fits(state: State, template: nn.Module, path: str | PathLike[str]) -> bool:
    try:
        fit_weights(state, template, name="", path=path)
    except (ModelError, KeyError):
        return False
    return True
