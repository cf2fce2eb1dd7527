"""The forward pass: every requested facet, saliency and embedding out of one run that computes nothing else.

"Deep ViT Features as Dense Visual Descriptors", sections 3 and 4: keys, queries and values come from a block's own
qkv projection of its normalised input, tokens are a block's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from dino_ops import attention as parts
from dino_ops.attention import PROJECTIONS, Projection
from dino_ops.backbone import Backbone
from dino_ops.errors import ModelError
from dino_ops.saliency import saliency_from_attention

QUERY: tuple[Projection, ...] = ("query",)

Facet = Literal["key", "query", "value", "token"]


@dataclass(frozen=True)
class LayerFacet:
    """A facet of a block: layer is its index from 0."""

    layer: int
    facet: Facet

    def __str__(self) -> str:
        return f"{self.facet}{self.layer}"


@dataclass(frozen=True)
class FeatureRequest:
    """What one forward pass should return.

    facets: any facets of any blocks. saliency: of the last block, over saliency_heads. embedding: the class token
    after the final norm. final_norm: pass token facets through the final norm, as DINOv2 and DINOv3 do.
    """

    facets: frozenset[LayerFacet] = frozenset()
    saliency: bool = False
    saliency_heads: tuple[int, ...] = ()
    embedding: bool = False
    final_norm: bool = False

    def check(self, backbone: Backbone) -> None:
        """Raise ModelError if the backbone cannot answer this request."""
        for wanted in self.facets:
            if wanted.facet not in get_args(Facet):
                raise ModelError(f"facet is key, query, value or token, not {wanted.facet!r}")
            if not 0 <= wanted.layer < backbone.depth:
                raise ModelError(
                    f"layer {wanted.layer} was asked of {backbone.name}, which has {backbone.depth} blocks: "
                    f"use 0 to {backbone.depth - 1}"
                )
        if (self.saliency or self.embedding) and not backbone.has_class_token:
            what = "saliency" if self.saliency else "embedding"
            raise ModelError(f"{backbone.name} has no class token and so no {what}: turn saliency and embedding off")
        if not (self.facets or self.saliency or self.embedding):
            raise ModelError("nothing was asked of the model: turn on descriptors, saliency or embedding")

    def facets_of(self, layer: int) -> frozenset[Facet]:
        return frozenset(wanted.facet for wanted in self.facets if wanted.layer == layer)

    def last_layer(self, depth: int) -> int:
        """The block after which nothing is needed."""
        if self.saliency or self.embedding:
            return depth - 1
        return max(wanted.layer for wanted in self.facets)


@dataclass
class Features:
    """Results for a batch of B images with N patches: facets (B, N, D), saliency (B, N) float32, embedding (B, D)."""

    facets: dict[LayerFacet, torch.Tensor] = field(default_factory=dict)
    saliency: torch.Tensor | None = None
    embedding: torch.Tensor | None = None


def compute_features(backbone: Backbone, pixels: torch.Tensor, request: FeatureRequest) -> Features:
    """Run the blocks once over normalised pixels (B, 3, H, W) and stop after the last one that anything needs."""
    tokens, rope = backbone.tokens(pixels)
    num_prefix = backbone.num_prefix_tokens
    features = Features()
    last = request.last_layer(backbone.depth)
    for layer, block in enumerate(backbone.blocks[: last + 1]):
        facets = request.facets_of(layer)
        whole_block = layer < last or "token" in facets
        of_class_token = layer == backbone.depth - 1 and (request.saliency or request.embedding)
        run = _BlockRun(block, tokens, rope, _projections(facets, whole_block, of_class_token, request.embedding))

        for name in PROJECTIONS:
            if name in facets:
                features.facets[LayerFacet(layer, name)] = run.projected[name][:, num_prefix:]
        if of_class_token and request.saliency:
            features.saliency = saliency_from_attention(run.class_attention(), num_prefix, request.saliency_heads)
        if whole_block:
            tokens = run.all_tokens()
            if "token" in facets:
                normalised = backbone.final_norm(tokens) if request.final_norm else tokens
                features.facets[LayerFacet(layer, "token")] = normalised[:, num_prefix:]
        if of_class_token and request.embedding:
            class_token = tokens[:, :1] if whole_block else run.class_token()
            features.embedding = backbone.final_norm(class_token).squeeze(1)
    return features


def _projections(
    facets: frozenset[Facet], whole_block: bool, of_class_token: bool, embedding: bool
) -> frozenset[Projection]:
    """The projections that a block must compute for all of its tokens."""
    if whole_block:
        return frozenset(PROJECTIONS)
    wanted = {name for name in PROJECTIONS if name in facets}
    if of_class_token:
        wanted |= {"key", "value"} if embedding else {"key"}
    return frozenset(wanted)


class _BlockRun:
    """One block over one batch of tokens (B, N, D): all of its tokens, or its class token alone."""

    def __init__(
        self, block: Any, tokens: torch.Tensor, rope: torch.Tensor | None, wanted: frozenset[Projection]
    ) -> None:
        self._block, self._attention = block, block.attn
        self._tokens, self._rope = tokens, rope
        self._normalised = block.norm1(tokens)
        self.projected = parts.project(self._attention, self._normalised, wanted)

    @cached_property
    def _key(self) -> torch.Tensor:
        return parts.ready_key(self._attention, self.projected["key"], self._rope)

    @cached_property
    def _class_query(self) -> torch.Tensor:
        if "query" in self.projected:
            query = self.projected["query"][:, :1]
        else:
            query = parts.project(self._attention, self._normalised[:, :1], QUERY)["query"]
        return parts.ready_query(self._attention, query, rope=None)  # the class token is not rotated

    def class_attention(self) -> torch.Tensor:
        return parts.class_attention(self._attention, self._class_query, self._key)

    def class_token(self) -> torch.Tensor:
        """The block's output at the class token: (B, 1, D)."""
        return self._finish(slice(0, 1), self._class_query)

    def all_tokens(self) -> torch.Tensor:
        """The block's output: (B, N, D)."""
        query = parts.ready_query(self._attention, self.projected["query"], self._rope)
        return self._finish(slice(None), query)

    def _finish(self, rows: slice, query: torch.Tensor) -> torch.Tensor:
        value = parts.split_heads(self._attention, self.projected["value"])
        attended = parts.attend(self._attention, self._normalised[:, rows], query, self._key, value)
        return parts.after_attention(self._block, self._tokens[:, rows], attended)
