"""How rates, weight decay, momentum and temperature change along a training (Caron et al. 2021, section 3.2)."""

from __future__ import annotations

import numpy as np


def cosine_schedule(
    start: float,
    end: float,
    iterations: int,
    *,
    warmup_iterations: int = 0,
    warmup_start: float = 0.0,
) -> np.ndarray:
    """A value for every iteration: (iterations,) float64, a linear warm-up to `start`, then half a cosine to `end`.

    Raises ValueError for a warm-up that is longer than the training.
    """
    if not 0 <= warmup_iterations <= iterations:
        raise ValueError(f"a warm-up of {warmup_iterations} iterations does not fit a training of {iterations}")
    rise = np.linspace(warmup_start, start, warmup_iterations)
    rest = iterations - warmup_iterations
    fall = end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(rest) / max(rest, 1)))
    return np.concatenate([rise, fall])


def temperature_schedule(start: float, end: float, epochs: int, *, warmup_epochs: int) -> np.ndarray:
    """The teacher's temperature in every epoch: (epochs,) float64, linear from start to end, which it keeps.

    A warm-up longer than the training is cut off.
    """
    rise = np.linspace(start, end, warmup_epochs)
    return np.concatenate([rise, np.full(max(epochs - warmup_epochs, 0), end)])[:epochs]
