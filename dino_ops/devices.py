"""The device and the arithmetic of this process, asked for by name and refused where it cannot work."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from dino_ops.errors import ModelError

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by "auto", "cpu", "cuda" or "cuda:N", as this very process sees it.

    Raises ModelError for a GPU that is not there: silently using the CPU would be found out hours later.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as e:
        raise ModelError(f"device is auto, cpu, cuda or cuda:N, not {str(device)!r}") from e
    if resolved.type not in ("cpu", "cuda"):
        raise ModelError(f"device is auto, cpu, cuda or cuda:N, not {str(device)!r}")
    if resolved.type == "cuda":
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= present:
            gpus = "1 GPU" if present == 1 else f"{present} GPUs"
            raise ModelError(f"device {device} was asked for, but this process sees {gpus}: use auto or cpu")
    return resolved


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision meant by "auto" on this device. Raises ModelError for float16 on a CPU."""
    if precision not in get_args(Precision):
        raise ModelError(f"precision is auto, float32, bfloat16 or float16, not {precision!r}")
    if precision == "float16" and device.type == "cpu":
        raise ModelError("precision float16 was asked for on a CPU, which is hundreds of times slower: use float32")
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """The type to run matrix products in, or None for plain float32."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
