"""A timm Vision Transformer as a source of tokens: any stride, any image size, either family of positions."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, RotaryEmbeddingDinoV3
from timm.layers.attention import Attention
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from dino_ops.errors import ModelError
from dino_ops.positions import RecentlyUsed, resize_dino, resize_timm, rope_at_centres

Position = Literal["dino", "timm", "centres"]


class Backbone(nn.Module):
    """The part of a Vision Transformer before its blocks, the blocks, and the final norm.

    vit: a timm VisionTransformer or Eva (DINOv3) whose blocks are the standard pre-norm ones.
    name: what messages call it.
    stride: pixels between patches; divides the patch size; None means the patch size. Smaller strides give
        overlapping patches and a denser grid ("Deep ViT Features as Dense Visual Descriptors", section 3).
    position: how positions meet a grid other than the training grid. "dino" as DINO's and DINOv2's code does, "timm"
        as timm does, "centres" at the patches' exact centres (rotary positions only).

    Raises ModelError for a network of another structure, a stride that does not divide the patch, and positions that
    the network cannot have.
    """

    def __init__(self, vit: Any, name: str, stride: int | None = None, position: Position = "dino") -> None:
        super().__init__()
        _check_structure(vit, name)
        self.vit = vit.eval().requires_grad_(False)
        self.name = name
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.stride = _check_stride(stride, self.patch_size, name)
        self.embed_dim: int = self.vit.embed_dim
        self.depth = len(self.vit.blocks)
        self.num_heads: int = self.vit.blocks[0].attn.num_heads
        self.num_prefix_tokens: int = self.vit.num_prefix_tokens
        self.has_class_token = self.vit.cls_token is not None
        self.mean: tuple[float, float, float] = tuple(self.vit.pretrained_cfg["mean"])
        self.std: tuple[float, float, float] = tuple(self.vit.pretrained_cfg["std"])
        self._rope: Any = getattr(self.vit, "rope", None)
        if position not in get_args(Position):
            raise ModelError(f"position is dino, timm or centres, not {position!r}")
        if position == "centres" and not isinstance(self._rope, RotaryEmbeddingDinoV3):
            raise ModelError(f"position=centres needs rotary positions, which {name} has not: use dino or timm")
        self.position = position
        self._positions: RecentlyUsed[torch.Tensor] = RecentlyUsed()
        self._ropes: RecentlyUsed[torch.Tensor] = RecentlyUsed()

    @property
    def blocks(self) -> list[Any]:
        return list(self.vit.blocks)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in a height x width image; remainders on the right and bottom are not seen."""
        return 1 + (height - self.patch_size) // self.stride, 1 + (width - self.patch_size) // self.stride

    def tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the first block sees of normalised pixels (B, 3, H, W).

        Returns tokens (B, prefix + rows * columns, D), prefix tokens (class, registers) first, patches in raster
        order, and the rotary embedding of the patches, (rows * columns, 2 * head dim), or None.
        """
        projection = self.vit.patch_embed.proj
        patches = F.conv2d(pixels, projection.weight, projection.bias, stride=self.stride)  # (B, D, rows, columns)
        size_hw = (pixels.shape[2], pixels.shape[3])
        patches = self.vit.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        tokens = self._with_prefix_and_positions(patches, size_hw)
        return self.vit.norm_pre(tokens), self._rope_embedding(size_hw)

    def class_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """The class token after the final norm, (B, D), of normalised pixels (B, 3, H, W), through whole blocks.

        With gradients, for training; the extraction computes it with `compute_features`, which saves work.
        """
        tokens, rope = self.tokens(pixels)
        for block in self.blocks:
            tokens = block(tokens) if rope is None else block(tokens, rope=rope)
        return self.final_norm(tokens[:, :1]).squeeze(1)

    def final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """The model's last LayerNorm, which timm keeps behind the pool in models that are pooled by averaging."""
        return self.vit.fc_norm(tokens) if isinstance(self.vit.norm, nn.Identity) else self.vit.norm(tokens)

    def _with_prefix_and_positions(self, patches: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
        prefix = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        positions = self._position_embedding(size_hw) if self.vit.pos_embed is not None else None
        if positions is not None and self.vit.no_embed_class:
            patches = patches + positions
        tokens = torch.cat([token.expand(len(patches), -1, -1) for token in prefix] + [patches], dim=1)
        if positions is not None and not self.vit.no_embed_class:
            tokens = tokens + positions
        return tokens

    def _position_embedding(self, size_hw: tuple[int, int]) -> torch.Tensor:
        if self.vit.training:  # every step changes the stored positions
            return self._resized_positions(size_hw)
        return self._positions.get(size_hw, lambda: self._resized_positions(size_hw))

    def _resized_positions(self, size_hw: tuple[int, int]) -> torch.Tensor:
        stored: torch.Tensor = self.vit.pos_embed
        old_grid, grid = tuple(self.vit.patch_embed.grid_size), self.grid(*size_hw)
        if self.position == "dino" and grid[0] * grid[1] == old_grid[0] * old_grid[1] and size_hw[0] == size_hw[1]:
            return stored
        num_prefix = 0 if self.vit.no_embed_class else self.num_prefix_tokens
        patch_positions = stored[:, num_prefix:].unflatten(1, old_grid)
        if self.position == "dino":
            resized = resize_dino(patch_positions, grid, registers=self.vit.reg_token is not None)
        else:
            resized = resize_timm(patch_positions, grid)
        return torch.cat([stored[:, :num_prefix], resized.flatten(1, 2)], dim=1)

    def _rope_embedding(self, size_hw: tuple[int, int]) -> torch.Tensor | None:
        if self._rope is None:
            return None
        return self._ropes.get(size_hw, lambda: self._rope_for(size_hw))

    def _rope_for(self, size_hw: tuple[int, int]) -> torch.Tensor:
        grid = self.grid(*size_hw)
        if self.position == "centres":
            return rope_at_centres(self._rope.periods, grid, self.stride, self.patch_size, size_hw)
        return self._rope.get_embed(shape=grid)

    def _apply(self, fn: Any, recurse: bool = True) -> Backbone:
        # Cached embeddings are no buffers: moving the module must not leave them on the old device.
        self._positions.clear()
        self._ropes.clear()
        return super()._apply(fn, recurse)


def _check_structure(vit: nn.Module, name: str) -> None:
    """Everything downstream recomputes parts of blocks, which is right only for blocks whose parts it knows."""
    if isinstance(vit, VisionTransformer):
        known = all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks)
    elif isinstance(vit, Eva):
        known = all(type(block) is EvaBlock and type(block.attn) is EvaAttention for block in vit.blocks)
        known = known and not vit.rope_mixed
    else:
        known = False
    patch_embed: Any = getattr(vit, "patch_embed", None)
    if not known or type(patch_embed) is not PatchEmbed or len(set(patch_embed.patch_size)) != 1:
        raise ModelError(
            f"{name} is a {type(vit).__name__} whose blocks or patches are not those of a plain Vision Transformer: "
            f"choose a DINO, DINOv2, DINOv3, DeiT or standard ViT model"
        )


def _check_stride(stride: int | None, patch_size: int, name: str) -> int:
    if stride is None:
        return patch_size
    divisors = [d for d in range(1, patch_size + 1) if patch_size % d == 0]
    if stride not in divisors:
        raise ModelError(
            f"stride {stride} does not divide the {patch_size} pixel patch of {name}: "
            f"use one of {', '.join(map(str, divisors))}"
        )
    return stride
