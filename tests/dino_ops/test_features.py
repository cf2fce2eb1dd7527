"""The forward pass against timm's own, hooks inside timm's blocks, and attention written out in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dino_ops.backbone import Backbone
from dino_ops.errors import ModelError
from dino_ops.features import Facet, FeatureRequest, Features, LayerFacet, compute_features

LAST = 2
PixelsFor = Callable[..., torch.Tensor]


def on_grid(network: Any, rows: int, columns: int, pixels_for: PixelsFor) -> torch.Tensor:
    patch = network.patch_embed.patch_size[0]
    return pixels_for(rows * patch, columns * patch)


def request(*facets: tuple[int, Facet], **others: Any) -> FeatureRequest:
    heads = {"saliency_heads": (0, 1, 2)} if others.get("saliency") else {}
    return FeatureRequest(frozenset(LayerFacet(*facet) for facet in facets), **(heads | others))


def compute(network: nn.Module, pixels: torch.Tensor, wanted: FeatureRequest, **options: Any) -> Features:
    with torch.inference_mode():
        return compute_features(Backbone(network, "tiny", **options), pixels, wanted)


@torch.inference_mode()
def inside_timm(network: Any, pixels: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Input and output of every block's attention and of every block, from timm's own forward pass."""
    seen: dict[str, list[torch.Tensor]] = {"attention_input": [], "block_output": []}
    hooks = []
    for block in network.blocks:
        hooks.append(block.attn.register_forward_pre_hook(lambda _, args: seen["attention_input"].append(args[0])))
        hooks.append(block.register_forward_hook(lambda _, args, output: seen["block_output"].append(output)))
    seen["features"] = [network.forward_features(pixels)]
    for hook in hooks:
        hook.remove()
    return seen


def project_by_hand(attention: Any, x: torch.Tensor) -> dict[str, np.ndarray]:
    """Queries, keys and values in float64: (B, N, heads * dims)."""
    x64 = x.double().numpy()
    if attention.qkv is None:
        layers = {"query": attention.q_proj, "key": attention.k_proj, "value": attention.v_proj}
        weights = {name: layer.weight for name, layer in layers.items()}
        biases = {name: layer.bias for name, layer in layers.items()}
    else:
        weights = dict(zip(("query", "key", "value"), attention.qkv.weight.chunk(3), strict=True))
        if attention.qkv.bias is not None:
            biases = dict(zip(("query", "key", "value"), attention.qkv.bias.chunk(3), strict=True))
        else:
            biases = {"query": getattr(attention, "q_bias", None), "value": getattr(attention, "v_bias", None)}
    projected = {}
    for name, weight in weights.items():
        projected[name] = x64 @ weight.double().numpy().T
        if biases.get(name) is not None:
            projected[name] = projected[name] + biases[name].double().numpy()
    return projected


@pytest.mark.parametrize("grid", [(4, 4), (5, 7)])
@pytest.mark.parametrize("final_norm", [False, True])
def test_tokens_equal_timm(
    family: str, network: Any, pixels_for: PixelsFor, grid: tuple[int, int], final_norm: bool
) -> None:
    pixels = on_grid(network, *grid, pixels_for)
    with torch.inference_mode():
        expected = network.forward_intermediates(
            pixels, indices=[0, 1, 2], norm=final_norm, intermediates_only=True, output_fmt="NLC"
        )
    if final_norm and isinstance(network.norm, nn.Identity):
        expected = [network.fc_norm(tokens) for tokens in expected]  # timm normalises such models after pooling
    wanted = request((0, "token"), (1, "token"), (2, "token"), final_norm=final_norm)
    ours = compute(network, pixels, wanted, position="timm")
    for layer in range(3):
        torch.testing.assert_close(ours.facets[LayerFacet(layer, "token")], expected[layer], rtol=1e-4, atol=1e-4)


def test_projections_equal_those_of_timms_blocks(network: Any, pixels_for: PixelsFor) -> None:
    pixels = on_grid(network, 4, 4, pixels_for)
    seen = inside_timm(network, pixels)
    for facet in ("key", "query", "value"):
        for layer in (0, LAST):
            ours = compute(network, pixels, request((layer, facet)), position="timm").facets[LayerFacet(layer, facet)]
            by_hand = project_by_hand(network.blocks[layer].attn, seen["attention_input"][layer])[facet]
            np.testing.assert_allclose(ours, by_hand[:, network.num_prefix_tokens :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["dino", "dinov2", "dinov2_reg", "dinov3", "dinov3_qkvb"])
def test_saliency_equals_attention_written_out(make_network: Callable, family: str, pixels_for: PixelsFor) -> None:
    network: Any = make_network(family)
    pixels = on_grid(network, 5, 4, pixels_for)
    backbone = Backbone(network, "tiny", position="timm")
    attention_input = inside_timm(network, pixels)["attention_input"][LAST]
    attention = network.blocks[LAST].attn
    projected = project_by_hand(attention, attention_input)
    rope = None
    if getattr(network, "rope", None) is not None:
        rope = network.rope.get_embed(shape=(5, 4)).double().numpy()
    prefix, dims = network.num_prefix_tokens, attention.head_dim

    expected = []
    for image in range(len(pixels)):
        rows = []
        for head in (0, 2):
            channels = slice(head * dims, (head + 1) * dims)
            query = projected["query"][image, 0, channels]
            keys = projected["key"][image, :, channels].copy()
            for patch in range(keys.shape[0] - prefix) if rope is not None else ():
                sine, cosine = rope[patch, :dims], rope[patch, dims:]
                first, second = np.split(keys[prefix + patch], 2)
                keys[prefix + patch] = keys[prefix + patch] * cosine + np.concatenate([-second, first]) * sine
            scores = np.exp(keys @ query / np.sqrt(dims))
            rows.append((scores / scores.sum())[prefix:])
        mean = np.mean(rows, axis=0)
        expected.append((mean - mean.min()) / (mean.max() - mean.min()))

    with torch.inference_mode():
        ours = compute_features(backbone, pixels, request(saliency=True, saliency_heads=(0, 2))).saliency
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_embedding_is_timms_normalised_class_token(network: Any, pixels_for: PixelsFor) -> None:
    pixels = on_grid(network, 4, 5, pixels_for)
    features = inside_timm(network, pixels)["features"][0]
    if isinstance(network.norm, nn.Identity):
        features = network.fc_norm(features)
    ours = compute(network, pixels, request(embedding=True), position="timm").embedding
    torch.testing.assert_close(ours, features[:, 0], rtol=1e-4, atol=1e-4)


def test_shortcut_of_the_last_block_equals_the_whole_block(network: Any, pixels_for: PixelsFor) -> None:
    """A token facet of the last block forces all of it to be computed; without one only fractions are."""
    pixels = on_grid(network, 4, 6, pixels_for)
    projections: list[tuple[int, Facet]] = [(LAST, "key"), (LAST, "query"), (LAST, "value")]
    whole = compute(network, pixels, request(*projections, (LAST, "token"), saliency=True, embedding=True))
    for facets in ([], projections[:1], projections[1:2], projections[2:], projections):
        for saliency in (False, True):
            part = compute(network, pixels, request(*facets, saliency=saliency, embedding=True))
            torch.testing.assert_close(part.embedding, whole.embedding, rtol=1e-4, atol=1e-5)
            if saliency:
                torch.testing.assert_close(part.saliency, whole.saliency, rtol=1e-4, atol=1e-5)
            else:
                assert part.saliency is None
            assert set(part.facets) == {LayerFacet(*facet) for facet in facets}
            for facet, tensor in part.facets.items():
                torch.testing.assert_close(tensor, whole.facets[facet], rtol=1e-4, atol=1e-5)


class ArithmeticOfTheLastBlock:
    """Rows multiplied by weights in a block's linear layers, counted from below."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products = 0
        original = torch.nn.functional.linear

        def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            self.products += x.numel() // x.shape[-1] * weight.numel()
            return original(x, weight, bias)

        monkeypatch.setattr(torch.nn.functional, "linear", counting)


@pytest.mark.parametrize(
    ("wanted", "all_token_projections", "class_token_only"),
    [
        (request((LAST, "key")), 1, 0),
        (request((LAST, "key"), (LAST, "value")), 2, 0),
        (request((LAST, "key"), saliency=True), 1, 1),  # the class token's query
        (request((LAST, "key"), saliency=True, embedding=True), 2, 10),  # and its output projection and MLP
    ],
)
def test_last_block_multiplies_only_what_is_needed(
    make_network: Callable,
    pixels_for: PixelsFor,
    monkeypatch: pytest.MonkeyPatch,
    wanted: FeatureRequest,
    all_token_projections: int,
    class_token_only: int,
) -> None:
    network: Any = make_network("dino")
    pixels = on_grid(network, 4, 4, pixels_for)
    tokens, square = 17 * len(pixels), 48 * 48
    whole_block = 12 * tokens * square
    counter = ArithmeticOfTheLastBlock(monkeypatch)
    compute(network, pixels, wanted)
    expected = LAST * whole_block + (all_token_projections * tokens + class_token_only * len(pixels)) * square
    assert counter.products == expected


@pytest.mark.parametrize(
    ("wanted", "blocks"),
    [
        (request((0, "key")), 1),
        (request((1, "token"), (0, "query")), 2),
        (request((0, "key"), saliency=True), 3),
        (request((0, "key"), embedding=True), 3),
    ],
)
def test_stops_after_the_last_block_needed(
    make_network: Callable, pixels_for: PixelsFor, wanted: FeatureRequest, blocks: int
) -> None:
    network: Any = make_network("dino")
    ran = []
    for i, block in enumerate(network.blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: ran.append(i))
    compute(network, on_grid(network, 4, 4, pixels_for), wanted)
    assert ran == list(range(blocks))


def test_batch_of_two_equals_singles(network: Any, pixels_for: PixelsFor) -> None:
    pixels = on_grid(network, 5, 4, pixels_for)
    wanted = request((1, "key"), (LAST, "value"), saliency=True, embedding=True)
    both = compute(network, pixels, wanted)
    for i in range(2):
        one = compute(network, pixels[i : i + 1], wanted)
        torch.testing.assert_close(one.saliency[0], both.saliency[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.embedding[0], both.embedding[i], rtol=1e-4, atol=1e-5)
        for facet in wanted.facets:
            torch.testing.assert_close(one.facets[facet][0], both.facets[facet][i], rtol=1e-4, atol=1e-5)


def test_constant_attention_gives_zero_saliency(make_network: Callable, pixels_for: PixelsFor) -> None:
    network: Any = make_network("dino")
    with torch.no_grad():
        network.blocks[LAST].attn.qkv.weight.zero_()
        network.blocks[LAST].attn.qkv.bias.zero_()
    saliency = compute(network, on_grid(network, 4, 4, pixels_for), request(saliency=True)).saliency
    assert torch.equal(saliency, torch.zeros(2, 16))


def test_requests_that_cannot_be_answered(make_network: Callable) -> None:
    backbone = Backbone(make_network("dino"), "tiny")
    with pytest.raises(ModelError, match="layer 3 was asked of tiny, which has 3 blocks: use 0 to 2"):
        request((3, "key")).check(backbone)
    with pytest.raises(ModelError, match="nothing was asked"):
        request().check(backbone)
    backbone.has_class_token = False
    with pytest.raises(ModelError, match="no class token and so no saliency"):
        request(saliency=True).check(backbone)
    with pytest.raises(ModelError, match="no class token and so no embedding"):
        request(embedding=True).check(backbone)
