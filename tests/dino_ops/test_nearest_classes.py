"""The weighted nearest-neighbour classifier against a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dino_ops import nearest_classes
from dino_ops.nearest_classes import classify_by_neighbours


def test_votes_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((5, 8))
    labels = generator.integers(0, 5, 300)
    embeddings = centres[labels] + 1.5 * generator.standard_normal((300, 8))
    queries = centres[generator.integers(0, 5, 40)] + 1.5 * generator.standard_normal((40, 8))
    monkeypatch.setattr(nearest_classes, "MAX_SIMILARITY_BLOCK_VALUES", 3_000)  # ten queries at once
    found = classify_by_neighbours(embeddings, labels, queries, ks=(10, 3, 20))
    for number, query in enumerate(queries):
        cosine = embeddings @ query / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosine)
        for k in (3, 10, 20):
            votes = np.bincount(labels[nearest[:k]], np.exp(cosine[nearest[:k]] / 0.07), minlength=5)
            assert found[k][number] == votes.argmax()


def test_without_queries_nobody_votes_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    embeddings, labels = generator.standard_normal((60, 4)), generator.integers(0, 3, 60)
    monkeypatch.setattr(nearest_classes, "MAX_SIMILARITY_BLOCK_VALUES", 700)  # eleven at once
    found = classify_by_neighbours(embeddings, labels, None, ks=(5, 59, 200))
    for number in range(60):
        others = np.delete(np.arange(60), number)
        alone = classify_by_neighbours(embeddings[others], labels[others], embeddings[[number]], ks=(5, 59))
        assert (found[5][number], found[59][number]) == (alone[5][0], alone[59][0])
        assert found[200][number] == found[59][number]
    with pytest.raises(ValueError, match="no labelled embeddings"):
        classify_by_neighbours(np.ones((1, 2)), np.zeros(1, np.int64), None)


def test_few_embeddings_and_none() -> None:
    found = classify_by_neighbours(torch.eye(2), np.array([1, 0]), torch.tensor([[2.0, 0.1]]), ks=(1, 200))
    assert (found[1].tolist(), found[200].tolist()) == ([1], [1])
    assert classify_by_neighbours(torch.eye(2), np.array([1, 0]), torch.zeros(0, 2))[20].tolist() == []
    with pytest.raises(ValueError, match="no labelled embeddings"):
        classify_by_neighbours(torch.zeros(0, 2), np.zeros(0, np.int64), torch.eye(2))
