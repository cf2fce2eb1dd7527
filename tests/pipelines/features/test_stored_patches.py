"""Which patches a store keeps, of an image whose saliency rises evenly from 0 to 1."""

from __future__ import annotations

import pytest
from hand_made import features
from small_runs import settings

from pipelines.features.stored_patches import stored_patches


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (["store.patches=none"], []),
        (["store.every=5"], [0, 5, 10]),
        (["store.patches=salient", "store.salient_threshold=0.7"], [8, 9, 10, 11]),
        (["store.patches=salient", "store.salient_threshold=0.7", "store.every=2"], [8, 10]),
    ],
)
def test_patches_that_are_kept(asked: list[str], kept: list[int]) -> None:
    assert stored_patches(features(grid=(3, 4)), settings(*asked).store).tolist() == kept
