"""Where patches are: position embeddings resized to another grid, and rotary embeddings of strided grids."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F

DINO_OFFSET = 0.1

T = TypeVar("T")


def resize_dino(patch_positions: torch.Tensor, grid_hw: tuple[int, int], registers: bool) -> torch.Tensor:
    """Patch position embeddings (1, old grid height, old grid width, D) at grid_hw, as DINO and DINOv2 resize them.

    Without registers the bicubic scale factor is (grid + 0.1) / old grid, which also shifts the sampling points, so
    it is not the same as resizing to a size; it has no antialiasing. DINOv2's models with registers were released
    with that offset removed and antialiasing on.
    """
    channels_first = patch_positions.permute(0, 3, 1, 2).float()
    if registers:
        resized = F.interpolate(channels_first, size=grid_hw, mode="bicubic", antialias=True)
    else:
        old_h, old_w = channels_first.shape[-2:]
        scale = ((grid_hw[0] + DINO_OFFSET) / old_h, (grid_hw[1] + DINO_OFFSET) / old_w)
        resized = F.interpolate(channels_first, scale_factor=scale, mode="bicubic")
    assert tuple(resized.shape[-2:]) == tuple(grid_hw)
    return resized.permute(0, 2, 3, 1).to(patch_positions.dtype)


def resize_timm(patch_positions: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Patch position embeddings (1, old grid height, old grid width, D) at grid_hw, as timm resizes them."""
    if tuple(patch_positions.shape[1:3]) == tuple(grid_hw):
        return patch_positions
    channels_first = patch_positions.permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels_first, size=grid_hw, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(patch_positions.dtype)


def rope_at_centres(
    periods: torch.Tensor, grid_hw: tuple[int, int], stride: int, patch_size: int, size_hw: tuple[int, int]
) -> torch.Tensor:
    """DINOv3's rotary embedding at exact patch centres: (grid height * grid width, 2 * head dim) of [sin, cos].

    periods: (head dim / 4,). A patch at row i is centred at (i * stride + patch / 2) pixels of size_hw[0]; centres are
    mapped from 0..size to -1..1 on each axis by itself, as DINOv3 maps (i + 0.5) / rows.
    """
    axes = [
        2 * (torch.arange(count, dtype=torch.float32) * stride + patch_size / 2) / size - 1
        for count, size in zip(grid_hw, size_hw, strict=True)
    ]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1).to(periods)  # (N, 2)
    angles = (2 * math.pi * coordinates[:, :, None] / periods).flatten(1)  # (N, head dim / 2): rows, then columns
    angles = angles.repeat(1, 2)  # the layout of rotate-half: both halves of a head turn by the same angles
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class RecentlyUsed(Generic[T]):
    """The last few results of a function of a grid: datasets repeat few shapes, but may hold thousands."""

    def __init__(self, capacity: int = 16) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[object, T] = OrderedDict()

    def get(self, key: object, compute: Callable[[], T]) -> T:
        """The entry of `key`, computed if it is not among the most recently used."""
        if key not in self._entries:
            self._entries[key] = compute()
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
