"""Stochastic depth whose draws depend on the image and the step alone, not on the process that computes them.

Huang et al. 2016. timm's own module draws from the process's random state, so that two processes with half a batch each
would train another network than one with the whole.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import nn


class StochasticDepth(nn.Module):
    """A residual branch (n, N, D) that is left out for some rows, and made larger for the others, when training.

    kept_rows_of_coming_passes: for each of the coming forward passes (n,) bool, the rows that keep the branch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.kept_rows_of_coming_passes: deque[torch.Tensor] = deque()

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0 or not self.kept_rows_of_coming_passes:
            return branch
        scale = self.kept_rows_of_coming_passes.popleft().to(branch.dtype) / (1 - self.rate)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))


def install_stochastic_depth(blocks: list[Any], rate: float) -> list[StochasticDepth]:
    """Give the blocks of a timm Vision Transformer StochasticDepth, at rates that rise linearly from 0 to `rate`."""
    installed = []
    for block, its_rate in zip(blocks, np.linspace(0, rate, len(blocks)), strict=True):
        for name in ("drop_path1", "drop_path2"):
            module = StochasticDepth(float(its_rate))
            setattr(block, name, module)
            installed.append(module)
    return installed


def draw_kept(modules: list[StochasticDepth], rows: int, seed: int, step: int) -> np.ndarray:
    """Which of a step's rows keep each branch: (modules, rows) bool, the same in every process.

    rows: of the whole step, all processes together.
    """
    draws = np.random.default_rng([seed, step]).random((len(modules), rows), dtype=np.float32)
    rates = np.array([module.rate for module in modules], np.float32)
    return draws >= rates[:, None]


def announce_kept(modules: list[StochasticDepth], passes: list[np.ndarray], device: torch.device) -> None:
    """Use these draws in the next forward passes: for each of them (modules, its rows) bool."""
    for module in modules:
        module.kept_rows_of_coming_passes.clear()
    for kept in passes:
        for module, rows in zip(modules, torch.from_numpy(np.ascontiguousarray(kept)).to(device), strict=True):
            if module.rate > 0:
                module.kept_rows_of_coming_passes.append(rows)
