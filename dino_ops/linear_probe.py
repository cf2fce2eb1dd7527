"""How good embeddings are: a linear classifier on top of them (Caron et al. 2021, section 4.1 and appendix F).

As published: SGD with momentum 0.9, no weight decay, a cosine schedule, weights from N(0, 0.01). The learning rate is
chosen among several, as DINOv2 does it, but on training vectors that are held out and not on those that are tested.
Embeddings are given, so the published random crops of the training images have no part in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

LEARNING_RATES_AT_BATCH_256 = tuple(float(rate) for rate in np.logspace(-4, 0.5, 10))
MOMENTUM = 0.9
BATCH_SIZE = 256
# Training vectors on which the rate is chosen.
HELD_OUT_SHARE = 0.1
INITIAL_DEVIATION = 0.01


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier.

    weight: (classes, D), bias: (classes,) float32. rate: the chosen learning rate. held_out_accuracy: its accuracy on
    the vectors held out, nan where there were too few to hold any out.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    rate: float
    held_out_accuracy: float

    def predict(self, embeddings: np.ndarray | torch.Tensor) -> np.ndarray:
        """The class of each embedding (n, D): (n,) int64."""
        vectors = _tensor(embeddings, self.weight.device)
        return F.linear(vectors, self.weight, self.bias).argmax(dim=1).cpu().numpy()


def fit_linear_probe(
    embeddings: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    *,
    classes: int,
    epochs: int = 100,
    seed: int = 0,
    device: str = "cpu",
) -> LinearProbe:
    """Fit a linear classifier.

    embeddings: (n, D), n > 0. labels: (n,) integers, 0 to classes - 1. Raises ValueError without embeddings.
    """
    if not len(embeddings):
        raise ValueError("there are no labelled embeddings to fit a classifier on")
    vectors = _tensor(embeddings, device)
    targets = torch.from_numpy(np.ascontiguousarray(labels, np.int64)).to(device)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(vectors))
    held, kept = np.split(order, [int(HELD_OUT_SHARE * len(order))])
    rate, accuracy = LEARNING_RATES_AT_BATCH_256[len(LEARNING_RATES_AT_BATCH_256) // 2], math.nan
    if len(held):
        fitted = _train(vectors[kept], targets[kept], classes, LEARNING_RATES_AT_BATCH_256, epochs, generator)
        said = _scores(vectors[held], *fitted).argmax(dim=2)  # (rates, n)
        right = (said == targets[held]).double().mean(dim=1)
        best = int(right.argmax())
        rate, accuracy = LEARNING_RATES_AT_BATCH_256[best], float(right[best])
    weight, bias = _train(vectors, targets, classes, (rate,), epochs, generator)
    return LinearProbe(weight[0], bias[0], rate, accuracy)


def _train(
    vectors: torch.Tensor,
    targets: torch.Tensor,
    classes: int,
    rates: tuple[float, ...],
    epochs: int,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classifiers for several rates at once: weights (rates, classes, D) and biases (rates, classes)."""
    start = generator.normal(0, INITIAL_DEVIATION, (classes, vectors.shape[1])).astype(np.float32)
    weight = torch.from_numpy(start).to(vectors.device).repeat(len(rates), 1, 1)
    bias = torch.zeros(len(rates), classes, device=vectors.device)
    speed = torch.zeros_like(weight), torch.zeros_like(bias)
    batch = min(BATCH_SIZE, len(vectors))
    steps = math.ceil(len(vectors) / batch)
    scale = torch.tensor(rates, device=vectors.device) * batch / 256
    for epoch in range(epochs):
        order = torch.from_numpy(generator.permutation(len(vectors))).to(vectors.device)
        step_size = scale * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for rows in order.chunk(steps):
            block, target = vectors[rows], targets[rows]
            error = _scores(block, weight, bias).softmax(dim=2)  # the gradient of the cross-entropy by the scores
            error[:, torch.arange(len(rows), device=rows.device), target] -= 1
            error /= len(rows)
            for parameter, velocity, gradient in (
                (weight, speed[0], torch.einsum("rbc,bd->rcd", error, block)),
                (bias, speed[1], error.sum(dim=1)),
            ):
                velocity.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(step_size.view(-1, *[1] * (parameter.ndim - 1)) * velocity)
    return weight, bias


def _scores(block: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(rates, n, classes)."""
    return torch.einsum("bd,rcd->rbc", block, weight) + bias[:, None]


def _tensor(embeddings: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    tensor = embeddings if isinstance(embeddings, torch.Tensor) else torch.tensor(embeddings)
    return tensor.to(device, torch.float32)
