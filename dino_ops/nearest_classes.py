"""How good embeddings are: a classifier that only looks at neighbours (Caron et al. 2021, section 4.1).

After Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

MAX_SIMILARITY_BLOCK_VALUES = 16_000_000


def classify_by_neighbours(
    embeddings: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    queries: np.ndarray | torch.Tensor | None,
    ks: Sequence[int] = (10, 20, 100, 200),
    *,
    temperature: float = 0.07,
) -> dict[int, np.ndarray]:
    """The label of each query by the votes of its k nearest embeddings, each weighing exp(cosine / temperature).

    embeddings: (n, D). labels: (n,) integers from 0. queries: (m, D), or None for the embeddings themselves, each of
    which then has no vote of its own. Of equal votes the lowest label wins; a k above n means all.
    Returns k -> (m,) int64.

    Raises ValueError without embeddings to compare with.
    """
    if len(embeddings) < (1 if queries is not None else 2):
        raise ValueError("there are no labelled embeddings to compare with")
    gallery = _directions(embeddings)
    asked = gallery if queries is None else _directions(queries)
    classes = int(labels.max()) + 1
    of_gallery = torch.from_numpy(np.ascontiguousarray(labels, np.int64)).to(gallery.device)
    most = min(max(ks), len(gallery) - (queries is None))
    found: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    rows = max(1, MAX_SIMILARITY_BLOCK_VALUES // len(gallery))
    for number, block in enumerate(asked.split(rows)):
        similarity = block @ gallery.T
        if queries is None:
            own = torch.arange(len(block), device=block.device)
            similarity[own, own + number * rows] = -torch.inf
        similarity, nearest = similarity.topk(most, dim=1)
        # relative to the nearest: the same winner, and no overflow
        weights = torch.exp((similarity - similarity[:, :1]).double() / temperature)
        votes = torch.zeros(len(block), classes, dtype=torch.float64, device=block.device)
        counted = 0
        for k in sorted(ks):
            upto = min(k, most)
            votes.scatter_add_(1, of_gallery[nearest[:, counted:upto]], weights[:, counted:upto])
            counted = upto
            found[k].append(votes.argmax(dim=1).cpu().numpy())
    return {k: np.concatenate(parts) if parts else np.zeros(0, np.int64) for k, parts in found.items()}


def _directions(embeddings: np.ndarray | torch.Tensor) -> torch.Tensor:
    tensor = embeddings if isinstance(embeddings, torch.Tensor) else torch.tensor(embeddings)
    return F.normalize(tensor.float(), dim=1)
