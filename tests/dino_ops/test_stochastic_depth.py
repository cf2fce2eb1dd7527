"""Stochastic depth: what is dropped, how often, and that no split of a batch changes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dino_ops.backbone import Backbone
from dino_ops.stochastic_depth import StochasticDepth, announce_kept, draw_kept, install_stochastic_depth

CPU = torch.device("cpu")


def test_kept_rows_grow_and_others_are_nothing() -> None:
    module = StochasticDepth(0.25).train()
    branch = torch.randn(4, 3, 5)
    kept = np.array([[True, False, True, True]])
    announce_kept([module], [kept], CPU)
    result = module(branch)
    for row, keep in enumerate(kept[0]):
        expected = branch[row] / 0.75 if keep else torch.zeros(3, 5)
        torch.testing.assert_close(result[row], expected)
    half = branch.bfloat16()
    announce_kept([module], [kept], CPU)
    assert module(half).dtype == torch.bfloat16


def test_what_is_dropped_gets_no_gradient() -> None:
    module, branch = StochasticDepth(0.5).train(), torch.randn(2, 3, 5, requires_grad=True)
    announce_kept([module], [np.array([[False, True]])], CPU)
    module(branch).sum().backward()
    assert branch.grad is not None
    torch.testing.assert_close(branch.grad[0], torch.zeros(3, 5))
    torch.testing.assert_close(branch.grad[1], torch.full((3, 5), 2.0))


def test_draws_are_for_one_pass_each_and_for_the_last_step_alone() -> None:
    modules = [StochasticDepth(0.5).train(), StochasticDepth(0.0).train(), StochasticDepth(0.5).train()]
    first, second = np.array([[True], [True], [False]]), np.array([[False, True], [False, True], [True, True]])
    announce_kept(modules, [~first, ~second], CPU)  # of a step that failed
    announce_kept(modules, [first, second], CPU)
    one, two = torch.ones(1, 2), torch.ones(2, 2)
    assert [module(one)[:, 0].tolist() for module in modules] == [[2], [1], [0]]
    assert [module(two)[:, 0].tolist() for module in modules] == [[0, 2], [1, 1], [2, 2]]


def test_neither_rate_0_nor_evaluation_touches_a_branch() -> None:
    branch = torch.randn(2, 3)
    always, evaluated = StochasticDepth(0.0).train(), StochasticDepth(0.5).eval()
    announce_kept([always, evaluated], [np.zeros((2, 2), bool)], CPU)
    assert always(branch) is branch and evaluated(branch) is branch
    assert (draw_kept([always], 1000, 0, 0)).all()


def test_draws_are_of_the_rate_and_independent() -> None:
    modules = [StochasticDepth(rate) for rate in (0.0, 0.1, 0.5, 0.9)]
    kept = draw_kept(modules, 20000, seed=3, step=4)
    assert kept.shape == (4, 20000) and kept.dtype == bool
    np.testing.assert_allclose(kept.mean(axis=1), [1, 0.9, 0.5, 0.1], atol=0.015)
    twins = draw_kept([StochasticDepth(0.5)] * 3, 20000, seed=3, step=4)
    np.testing.assert_allclose(np.corrcoef(twins), np.eye(3), atol=0.03)
    # rows that are kept make up for those that are not
    scaled = kept[1:] / (1 - np.array([0.1, 0.5, 0.9])[:, None])
    np.testing.assert_allclose(scaled.mean(axis=1), 1, atol=0.1)


def test_a_draw_depends_on_seed_and_step() -> None:
    modules = [StochasticDepth(0.5), StochasticDepth(0.5)]
    draw = draw_kept(modules, 64, seed=1, step=2)
    np.testing.assert_array_equal(draw, draw_kept(modules, 64, seed=1, step=2))
    others = [draw_kept(modules, 64, seed, step) for seed, step in ((1, 3), (2, 2), (2, 1), (0, 2), (1, 0))]
    assert all((draw != other).any() for other in others)


@pytest.mark.parametrize("family", ["dino", "dinov3"])
def test_blocks_drop_more_the_deeper_they_are(make_network: Callable, family: str) -> None:
    network: Any = make_network(family)
    backbone = Backbone(network, "tiny")
    pixels = torch.randn(3, 3, 64, 64)
    expected = backbone.class_tokens(pixels)
    installed = install_stochastic_depth(backbone.blocks, 0.4)
    assert [module.rate for module in installed] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    assert [module for module in network.modules() if isinstance(module, StochasticDepth)] == installed
    assert torch.equal(backbone.class_tokens(pixels), expected)

    backbone.train()
    kept = np.ones((6, 3), bool)
    kept[:, 1], kept[2:, 2] = False, False
    announce_kept(installed, [kept], CPU)
    rows = backbone.class_tokens(pixels)
    # the first block, of rate 0, never drops: it is all that rows 1 and 2 keep
    tokens, rope = backbone.tokens(pixels)
    with torch.no_grad():
        backbone.eval()
        tokens = backbone.blocks[0](tokens) if rope is None else backbone.blocks[0](tokens, rope=rope)
        shallow = backbone.final_norm(tokens[:, :1]).squeeze(1)
    torch.testing.assert_close(rows[1:], shallow[1:])
    assert (rows[0] - expected[0]).abs().max() > 0.01  # its branches are made larger


def test_two_halves_of_a_batch_are_the_whole(make_network: Callable) -> None:
    network: Any = make_network("dino")
    backbone = Backbone(network, "tiny").train()
    modules = install_stochastic_depth(backbone.blocks, 0.5)
    pixels = torch.randn(6, 3, 32, 32)
    kept = draw_kept(modules, 6, seed=0, step=1)
    announce_kept(modules, [kept], CPU)
    whole = backbone.class_tokens(pixels)
    announce_kept(modules, [kept[:, :3], kept[:, 3:]], CPU)
    halves = torch.cat([backbone.class_tokens(half) for half in pixels.chunk(2)])
    torch.testing.assert_close(halves, whole)
    assert 0 < kept[2:].mean() < 1
