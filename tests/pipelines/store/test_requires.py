"""What a store lacks is said in the same words, whatever job asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hand_made import add_images, source
from small_runs import settings

from pipelines.errors import RequestError
from pipelines.store.store import Store


def made(folder: Path, *overrides: str, images: bool = True) -> Store:
    store = Store.create(str(folder / "store"), settings(*overrides))
    if images:
        add_images(store, "20260101T000000Z-000000", [source("a.jpg")])
        store.refresh()
    return store


@pytest.mark.parametrize(
    ("override", "required", "sentence"),
    [
        (
            "store.patches=none",
            {"patches": True, "instead": "give --of embeddings"},
            "has no patches (store.patches=none), but matching needs patches: give --of embeddings, or extract into "
            "another store with store.patches=all.",
        ),
        (
            "store.every=2",
            {"whole_grid": True},
            "does not hold the whole grid of patches (store.every=2), but matching needs it: extract into another "
            "store with store.patches=all and store.every=1.",
        ),
        (
            "features.saliency=false",
            {"saliency": True},
            "has no saliency (features.saliency=false), but matching needs saliency: extract into another store with "
            "features.saliency=true.",
        ),
        (
            "features.embedding=false",
            {"embedding": True},
            "has no embeddings (features.embedding=false), but matching needs embeddings: extract into another store "
            "with features.embedding=true.",
        ),
    ],
)
def test_what_is_lacking_is_named_with_the_way_out(
    tmp_path: Path, override: str, required: dict[str, Any], sentence: str
) -> None:
    store = made(tmp_path, override, images=False)
    with pytest.raises(RequestError) as told:
        store.requires("matching", **required)
    assert str(told.value) == f"The store {store.uri} {sentence}"
    others = made(tmp_path / "whole", images=False)
    others.requires("matching", **required)


def test_a_descriptor_that_is_not_stored(tmp_path: Path) -> None:
    store = made(tmp_path, "features.extra=[{layer: 9, facet: key}]", images=False)
    store.requires("matching", descriptor=("correspond.descriptor", "descriptor_key9"))
    with pytest.raises(RequestError, match=r"is descriptor_key3, but .* descriptor, descriptor_key9"):
        store.requires("matching", descriptor=("correspond.descriptor", "descriptor_key3"))


def test_images_that_are_not_there_yet(tmp_path: Path) -> None:
    empty = made(tmp_path, images=False)
    with pytest.raises(RequestError, match=r"has no images yet: run `dinoray extract INPUT .*` first"):
        empty.requires("matching", images=True)
    made(tmp_path / "filled").requires("matching", images=True)
