"""Saliency maps from attention rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_ops.errors import ModelError
from dino_ops.saliency import check_heads, minmax_per_image, saliency_from_attention


def test_mean_of_heads_without_prefix_stretched_per_image() -> None:
    attention = torch.rand(3, 4, 2 + 10, generator=torch.Generator().manual_seed(0))
    attention[1] *= 100  # one image must not change another's map
    ours = saliency_from_attention(attention, num_prefix_tokens=2, heads=(1, 3))
    for image in range(3):
        mean = (attention[image, 1, 2:] + attention[image, 3, 2:]).numpy() / 2
        np.testing.assert_allclose(ours[image], (mean - mean.min()) / (mean.max() - mean.min()), atol=1e-6)
        assert ours[image].min() == 0 and ours[image].max() == 1


def test_constant_maps_are_zero_beside_others() -> None:
    values = torch.stack([torch.full((5,), 0.3), torch.arange(5.0)])
    stretched = minmax_per_image(values)
    assert stretched.tolist() == [[0, 0, 0, 0, 0], [0, 0.25, 0.5, 0.75, 1]]
    assert minmax_per_image(torch.ones(1, 1)).tolist() == [[0]]


def test_heads() -> None:
    assert check_heads("all", 3, "tiny") == [0, 1, 2]
    assert check_heads([2, 0], 3, "tiny") == [2, 0]
    for wrong in ([], [3], [-1]):
        with pytest.raises(ModelError, match="give 'all' or heads from 0 to 2"):
            check_heads(wrong, 3, "tiny")
