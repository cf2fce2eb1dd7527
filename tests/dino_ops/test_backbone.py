"""Grids, strides and positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_ops.backbone import Backbone
from dino_ops.errors import ModelError
from dino_ops.positions import RecentlyUsed, resize_dino, resize_timm, rope_at_centres


@pytest.mark.parametrize(("family", "patch"), [("dino", 16), ("dinov2", 14), ("dinov2_reg", 14), ("dinov3", 16)])
def test_strided_patches_are_windows_of_the_image(make_network: Callable, family: str, patch: int) -> None:
    """Token (row, column) of a dense grid is the patch embedding of the window that starts at its pixel."""
    network: Any = make_network(family)
    if network.pos_embed is not None:
        network.pos_embed.zero_()
    image = torch.randn(1, 3, 61, 75)
    for stride in (patch, patch // 2, patch // 4 if patch == 16 else 2):
        backbone = Backbone(network, "tiny", stride=stride)
        rows, columns = backbone.grid(61, 75)
        assert (rows, columns) == (1 + (61 - patch) // stride, 1 + (75 - patch) // stride)
        tokens, _ = backbone.tokens(image)
        tokens = tokens[:, network.num_prefix_tokens :]
        assert tokens.shape == (1, rows * columns, 48)
        for row, column in ((0, 0), (rows - 1, columns - 1), (1, 0)):
            top, left = row * stride, column * stride
            window = image[..., top : top + patch, left : left + patch]
            expected = (network.patch_embed.proj.weight * window).sum((1, 2, 3)) + network.patch_embed.proj.bias
            torch.testing.assert_close(tokens[0, row * columns + column], expected, rtol=1e-4, atol=1e-4)


def test_strides_must_divide_the_patch(make_network: Callable) -> None:
    with pytest.raises(ModelError, match="stride 4 does not divide the 14 pixel patch of tiny: use one of 1, 2, 7, 14"):
        Backbone(make_network("dinov2"), "tiny", stride=4)
    for wrong in (0, -1, 32):
        with pytest.raises(ModelError):
            Backbone(make_network("dino"), "tiny", stride=wrong)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75."""
    t = abs(distance)
    if t <= 1:
        return 1.25 * t**3 - 2.25 * t**2 + 1
    return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def cubic_matrix(old: int, new: int, offset: float) -> np.ndarray:
    """Rows of weights that resample `old` values to `new`, border repeated."""
    matrix = np.zeros((new, old))
    for target in range(new):
        source = (target + 0.5) * old / (new + offset) - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            matrix[target, min(max(tap, 0), old - 1)] += cubic(source - tap)
    return matrix


def test_dino_positions_against_cubic_interpolation_written_out() -> None:
    stored = torch.randn(1, 6, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = np.einsum("yi,xj,ijc->yxc", cubic_matrix(6, 9, 0.1), cubic_matrix(6, 4, 0.1), stored[0].double().numpy())
    np.testing.assert_allclose(resize_dino(stored, (9, 4), registers=False)[0], expected, atol=1e-5)


def test_families_of_positions_differ() -> None:
    stored = torch.randn(1, 6, 6, 5)
    dino, registers = resize_dino(stored, (4, 4), registers=False), resize_dino(stored, (4, 4), registers=True)
    assert (dino - registers).norm() > 0.02 * dino.norm()
    assert torch.equal(registers, resize_timm(stored, (4, 4)))
    assert torch.equal(resize_timm(stored, (6, 6)), stored)


def test_positions_are_used_as_they_are_only_for_square_images(make_network: Callable) -> None:
    """DINO's rule: as many patches as trained with, and height equal to width (in pixels)."""
    network: Any = make_network("dino")
    backbone = Backbone(network, "tiny")
    assert backbone._position_embedding((64, 64)) is network.pos_embed
    assert backbone._position_embedding((70, 70)) is network.pos_embed
    resized = backbone._position_embedding((64, 70))
    assert resized.shape == network.pos_embed.shape
    assert torch.equal(resized[:, 0], network.pos_embed[:, 0])
    assert (resized[:, 1:] - network.pos_embed[:, 1:]).abs().max() > 1e-3


def test_rope_of_the_dense_grid_and_at_centres(make_network: Callable) -> None:
    network: Any = make_network("dinov3")
    plain = Backbone(network, "tiny")
    at_centres = Backbone(network, "tiny", position="centres")
    pixels = torch.zeros(1, 3, 80, 64)
    expected = network.rope.get_embed(shape=(5, 4))
    torch.testing.assert_close(plain.tokens(pixels)[1], expected)
    torch.testing.assert_close(at_centres.tokens(pixels)[1], expected)  # a multiple of the patch: no difference

    dense = Backbone(network, "tiny", stride=8).tokens(pixels)[1]
    torch.testing.assert_close(dense, network.rope.get_embed(shape=(9, 7)))
    exact = Backbone(network, "tiny", stride=8, position="centres").tokens(pixels)[1]
    assert exact is not None
    even = exact.unflatten(0, (9, 7))[::2, ::2].flatten(0, 1)  # patches that the plain grid has, too
    torch.testing.assert_close(even, expected)


def test_rope_at_centres_written_out() -> None:
    periods = torch.tensor([1.0, 3.0])
    rope = rope_at_centres(periods, (2, 3), stride=4, patch_size=8, size_hw=(13, 17))
    row, column = 1, 2
    y, x = 2 * (row * 4 + 4) / 13 - 1, 2 * (column * 4 + 4) / 17 - 1
    angles = 2 * np.pi * np.array([y / 1, y / 3, x / 1, x / 3] * 2)
    np.testing.assert_allclose(rope[row * 3 + column], [*np.sin(angles), *np.cos(angles)], atol=1e-5)


def test_centres_need_rotary_positions(make_network: Callable) -> None:
    with pytest.raises(ModelError, match="position=centres needs rotary positions, which tiny has not"):
        Backbone(make_network("dino"), "tiny", position="centres")
    with pytest.raises(ModelError, match="position is dino, timm or centres"):
        Backbone(make_network("dino"), "tiny", position="other")


def test_positions_are_remembered_but_not_for_ever(make_network: Callable) -> None:
    backbone = Backbone(make_network("dino"), "tiny")
    assert backbone._position_embedding((64, 96)) is backbone._position_embedding((64, 96))
    for width in range(64, 64 + 16 * 40, 16):
        backbone._position_embedding((64, width))
    assert len(backbone._positions) <= 16
    backbone.double()
    assert len(backbone._positions) == 0  # what was computed for other weights is gone


def test_recently_used_drops_the_oldest() -> None:
    cache: RecentlyUsed[int] = RecentlyUsed(capacity=2)
    computed = []

    def entry(key: int) -> int:
        return cache.get(key, lambda: computed.append(key) or key)

    for key in (1, 2, 1, 3, 1, 2):
        assert entry(key) == key
    assert computed == [1, 2, 3, 2]


def test_training_grid_equals_plain_convolution(make_network: Callable) -> None:
    network: Any = make_network("dino")
    pixels = torch.randn(1, 3, 64, 64)
    expected = F.conv2d(pixels, network.patch_embed.proj.weight, network.patch_embed.proj.bias, stride=16)
    tokens, rope = Backbone(network, "tiny", stride=16).tokens(pixels)
    assert rope is None
    torch.testing.assert_close(tokens[:, 1:], expected.flatten(2).transpose(1, 2) + network.pos_embed[:, 1:])
    torch.testing.assert_close(tokens[:, :1], network.cls_token + network.pos_embed[:, :1])
