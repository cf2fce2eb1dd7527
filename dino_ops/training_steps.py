"""Pieces of a training step: which parameters decay, how gradients are clipped, how the teacher follows.

Caron et al. 2021, section 3.1 and appendix C; published code of facebookresearch/dino.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters for an optimiser: matrices, which decay, and biases and norms, which do not."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else others).append(parameter)
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def clip_each_gradient(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale every parameter's own gradient down to a norm of `most`, in place; not the norm of all together."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    for gradient, norm in zip(gradients, torch._foreach_norm(gradients), strict=True):
        gradient.mul_((most / (norm + 1e-6)).clamp(max=1.0))


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leave parameters as they are in this step: the prototypes, in the first epoch."""
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of the teacher towards the student's: momentum x teacher + (1 - momentum) x student.

    Buffers are copied. Raises ValueError for modules of another shape.
    """
    pairs = zip(teacher.named_parameters(), student.named_parameters(), strict=True)
    ours, theirs = [], []
    for (name, parameter), (other_name, other) in pairs:
        if name != other_name or parameter.shape != other.shape:
            raise ValueError(
                f"teacher and student differ: {name} {tuple(parameter.shape)}, {other_name} {tuple(other.shape)}"
            )
        ours.append(parameter.data)
        theirs.append(other.data)
    torch._foreach_mul_(ours, momentum)
    torch._foreach_add_(ours, theirs, alpha=1 - momentum)
    for buffer, current in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(current)
