"""One transformer block in parts, so that only what was asked for is computed.

Works on the standard pre-norm blocks of timm's VisionTransformer (Block, Attention) and Eva (EvaBlock, EvaAttention).
Letters: B images, N tokens, D channels, h heads, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

Projection = Literal["query", "key", "value"]
PROJECTIONS: tuple[Projection, ...] = ("query", "key", "value")


def project(attention: Any, x: torch.Tensor, wanted: Collection[Projection]) -> dict[Projection, torch.Tensor]:
    """Queries, keys and values of x (B, N, D): each (B, N, h * d), as projected, bias included.

    They are neither scaled, normalised nor rotated. Only the rows of the weights that were asked for take part;
    neighbouring ones in a single product.
    """
    if attention.qkv is None:
        layers = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        return {name: layers[name](x) for name in PROJECTIONS if name in wanted}
    weight, bias = attention.qkv.weight, _fused_bias(attention)
    width = weight.shape[0] // 3
    projected: dict[Projection, torch.Tensor] = {}
    for run in _runs([name in wanted for name in PROJECTIONS]):
        rows = slice(run.start * width, run.stop * width)
        product = F.linear(x, weight[rows], None if bias is None else bias[rows])
        projected.update(zip(PROJECTIONS[run], product.split(width, dim=-1), strict=True))
    return projected


def split_heads(attention: Any, projected: torch.Tensor) -> torch.Tensor:
    """(B, N, h * d) -> (B, h, N, d)."""
    return projected.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def ready_query(attention: Any, query: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """A projected query (B, N, h * d) as attention uses it: (B, h, N, d), normalised and rotated."""
    return _rotate(attention, attention.q_norm(split_heads(attention, query)), rope).to(query.dtype)


def ready_key(attention: Any, key: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """A projected key (B, N, h * d) as attention uses it: (B, h, N, d), normalised and rotated."""
    return _rotate(attention, attention.k_norm(split_heads(attention, key)), rope).to(key.dtype)


def attend(
    attention: Any, x: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The attention module's output (B, M, D) for M query tokens x (B, M, D), its input at those tokens.

    query (B, h, M, d) and key (B, h, N, d) are ready; value is (B, h, N, d).
    """
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    mixed = attention.norm(mixed.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        mixed = mixed * attention.gate(x).sigmoid()
    return attention.proj(mixed)


def class_attention(attention: Any, class_query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """How much the class token attends to every token: (B, h, N) float32, each row summing to 1.

    class_query: (B, h, 1, d) and key: (B, h, N, d), both ready. One row, so memory grows with N and not with its
    square.
    """
    # Half precision would leave steps in the map.
    with torch.autocast(class_query.device.type, enabled=False):
        scores = (class_query.float() * attention.scale) @ key.float().transpose(-2, -1)
        return scores.squeeze(2).softmax(dim=-1)


def after_attention(block: Any, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The rest of a block for any tokens of it: x (B, M, D) before it, attended (B, M, D), both of the same tokens."""
    x = x + _scaled(block, 1, attended)
    return x + _scaled(block, 2, block.mlp(block.norm2(x)))


def _scaled(block: Any, branch: int, residual: torch.Tensor) -> torch.Tensor:
    """LayerScale: a module in VisionTransformer, a bare parameter (or none) in Eva."""
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(residual)
    gamma = getattr(block, f"gamma_{branch}")
    return residual if gamma is None else gamma * residual


def _fused_bias(attention: Any) -> torch.Tensor | None:
    if attention.qkv.bias is not None:
        return attention.qkv.bias
    if getattr(attention, "q_bias", None) is None:
        return None
    return torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])


def _rotate(attention: Any, x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """Rotate the patch tokens of x (B, h, N, d); prefix tokens have no place in the image."""
    if rope is None:
        return x
    prefix, patches = x.split([attention.num_prefix_tokens, x.shape[2] - attention.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attention.rotate_half).to(prefix.dtype)], dim=2)


def _runs(flags: Sequence[bool]) -> list[slice]:
    """Slices of consecutive true flags: [True, False, True] -> [0:1, 2:3]."""
    starts = [i for i, flag in enumerate(flags) if flag and (i == 0 or not flags[i - 1])]
    stops = [i + 1 for i, flag in enumerate(flags) if flag and (i + 1 == len(flags) or not flags[i + 1])]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
