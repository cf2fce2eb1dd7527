"""Devices and precisions asked for by name."""

from __future__ import annotations

import pytest
import torch

from dino_ops.devices import autocast_dtype, resolve_device, resolve_precision
from dino_ops.errors import ModelError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_is_what_the_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto").type == expected


def test_missing_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="this process sees 0 GPUs"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1").index == 1
    for wrong, message in (("cuda:2", "sees 2 GPUs"), ("tpu", "not 'tpu'"), ("meta", "not 'meta'")):
        with pytest.raises(ModelError, match=message):
            resolve_device(wrong)


def test_precisions() -> None:
    assert resolve_precision("auto", CPU) == "float32"
    assert resolve_precision("auto", GPU) == "bfloat16"
    assert resolve_precision("float16", GPU) == "float16"
    assert resolve_precision("bfloat16", CPU) == "bfloat16"
    with pytest.raises(ModelError, match="float16 was asked for on a CPU"):
        resolve_precision("float16", CPU)
    with pytest.raises(ModelError, match="precision is auto"):
        resolve_precision("double", CPU)
    assert autocast_dtype("float32") is None
    assert autocast_dtype("bfloat16") == torch.bfloat16
