"""Saliency: how much the class token of the last block attends to each patch.

"Deep ViT Features as Dense Visual Descriptors", section 3 (saliency maps), with one correction: the reference
normalises a batch by mixing its images; here each image has its own minimum and maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from dino_ops.errors import ModelError


def saliency_from_attention(attention_row: torch.Tensor, num_prefix_tokens: int, heads: Sequence[int]) -> torch.Tensor:
    """Saliency in 0..1 per patch, (B, patches), from the class token's attention (B, heads, prefix + patches).

    The softmax behind attention_row includes the prefix tokens; they are dropped here, after it.
    """
    patches = attention_row[:, list(heads), num_prefix_tokens:]
    return minmax_per_image(patches.mean(dim=1))


def minmax_per_image(values: torch.Tensor) -> torch.Tensor:
    """Each row of (B, N) stretched to 0..1; a constant row becomes zeros."""
    low, high = values.aminmax(dim=1, keepdim=True)
    span = high - low
    return torch.where(span > 0, (values - low) / torch.where(span > 0, span, 1), 0)


def check_heads(heads: Literal["all"] | Sequence[int], num_heads: int, name: str) -> list[int]:
    """The heads to average, as indices. Raises ModelError for an empty list or heads the model does not have."""
    if heads == "all":
        return list(range(num_heads))
    chosen = [int(head) for head in heads]
    if not chosen or not all(0 <= head < num_heads for head in chosen):
        raise ModelError(f"saliency_heads {chosen} of {name}: give 'all' or heads from 0 to {num_heads - 1}")
    return chosen
