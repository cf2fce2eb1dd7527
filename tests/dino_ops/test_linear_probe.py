"""The linear probe against another linear classifier, and against torch's own gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dino_ops import linear_probe
from dino_ops.linear_probe import fit_linear_probe


def test_digits_are_told_apart_as_well_as_by_discriminant_analysis() -> None:
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels - pixels.mean(axis=0)) / 8
    train, test = np.split(np.random.default_rng(0).permutation(len(pixels)), [1200])
    probe = fit_linear_probe(pixels[train], labels[train], classes=10)
    own = float((probe.predict(pixels[test]) == labels[test]).mean())
    other = LinearDiscriminantAnalysis().fit(pixels[train], labels[train]).score(pixels[test], labels[test])
    assert own >= other
    assert 0.9 < probe.held_out_accuracy <= 1
    assert probe.rate in linear_probe.LEARNING_RATES_AT_BATCH_256


def test_a_step_is_that_of_torch() -> None:
    """One epoch of one batch: the weights move along torch's own gradient of the cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    vectors, targets = torch.randn(20, 6, generator=generator), torch.randint(0, 3, (20,), generator=generator)
    weight, bias = linear_probe._train(vectors, targets, 3, (0.5, 2.0), 1, np.random.default_rng(1))
    start = np.random.default_rng(1).normal(0, 0.01, (3, 6)).astype(np.float32)
    for at, rate in enumerate((0.5, 2.0)):
        own = torch.tensor(start, requires_grad=True), torch.zeros(3, requires_grad=True)
        F.cross_entropy(F.linear(vectors, *own), targets).backward()
        for ours, parameter in zip((weight[at], bias[at]), own, strict=True):
            assert parameter.grad is not None
            expected = parameter.detach() - rate * 20 / 256 * parameter.grad
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_few_vectors_and_none() -> None:
    probe = fit_linear_probe(np.eye(3), np.array([2, 0, 1]), classes=3, epochs=200)
    assert probe.predict(np.eye(3)).tolist() == [2, 0, 1]
    assert math.isnan(probe.held_out_accuracy)
    again = fit_linear_probe(np.eye(3), np.array([2, 0, 1]), classes=3, epochs=200)
    assert torch.equal(probe.weight, again.weight)
    with pytest.raises(ValueError, match="no labelled embeddings"):
        fit_linear_probe(np.zeros((0, 3)), np.zeros(0, np.int64), classes=2)
