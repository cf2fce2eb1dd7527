"""How the published extractor computes, for comparison; written from its description.

One image at a time; every block keeps its whole attention matrix; descriptors come from a hook on the input of a
block's attention, whose qkv projection is computed a second time. Saliency takes a pass of its own there; here it may
share the pass of the descriptors, which is kinder to it.
"""

from __future__ import annotations

from typing import Any

import torch

from dino_ops.backbone import Backbone


@torch.inference_mode()
def descriptor_and_saliency(
    backbone: Backbone, pixels: torch.Tensor, layer: int, passes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys (1, N, D) of a block, saliency (1, patches) and the final class token (1, D) of pixels (1, 3, H, W)."""
    keys = saliency = class_token = torch.empty(0)
    for number in range(passes):
        attention_input, attention, tokens = _forward(backbone, pixels, layer)
        if number == 0:
            module: Any = backbone.blocks[layer].attn
            qkv = module.qkv(attention_input)
            keys = qkv.unflatten(-1, (3, -1))[:, 1:, 1]
            class_token = backbone.final_norm(tokens)[:, 0]
        if number == passes - 1:
            row = attention[:, :, 0, 1:].mean(dim=1)
            low, high = row.min(), row.max()
            saliency = (row - low) / (high - low)
    return keys, saliency, class_token


def _forward(backbone: Backbone, pixels: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The input of one block's attention, the last block's attention matrices, and the last block's output."""
    tokens, _ = backbone.tokens(pixels)
    hooked = attention = tokens
    for index, block in enumerate(backbone.blocks):
        normalised = block.norm1(tokens)
        if index == layer:
            hooked = normalised
        module = block.attn
        batch, count, channels = normalised.shape
        qkv = module.qkv(normalised).reshape(batch, count, 3, module.num_heads, channels // module.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = ((query @ key.transpose(-2, -1)) * module.scale).softmax(dim=-1)
        tokens = tokens + module.proj((attention @ value).transpose(1, 2).reshape(batch, count, channels))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return hooked, attention, tokens
