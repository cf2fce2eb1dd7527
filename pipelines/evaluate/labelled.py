"""Embeddings with labels, of a store to learn from and of one to be tested on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import RequestError
from pipelines.settings.sections import Config
from pipelines.store.store import Store

# The position of a label that no image to learn from has.
UNKNOWN = -1


@dataclass(frozen=True)
class Labelled:
    """Images of a store that have a label.

    embeddings: (n, D) float32. labels: (n,) int64, positions in `names`, or UNKNOWN. unlabelled: images left out.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    names: list[str]
    unlabelled: int

    @property
    def unknown(self) -> int:
        """Images whose label no image to learn from has."""
        return int((self.labels == UNKNOWN).sum())


def open_pair(store: str, test: str | None, config: Config) -> tuple[Store, Store | None]:
    """The store to learn from and the one to be tested on.

    Raises RequestError for stores without embeddings, and for two of another spec, whose embeddings do not compare.
    """
    opened = Store.open(store, config)
    other = Store.open(test, config) if test else None
    for one in (opened, other):
        if one is not None:
            one.requires("this evaluation", embedding=True)
    if other is not None and other.fingerprint != opened.fingerprint:
        raise RequestError(
            f"The stores {opened.uri} and {other.uri} were made with different specs, so their embeddings do not "
            "compare: extract both with the same settings and weights."
        )
    return opened, other


def read_labelled(store: Store, names: list[str] | None = None) -> Labelled:
    """names: labels of the images to learn from; None: they are this store's.

    Raises RequestError when no image has a label.
    """
    images = store.images.read(["image_id", "label", "embedding"]).sort_by("image_id").combine_chunks()
    labelled = images.filter(pc.is_valid(images["label"]))
    if not len(labelled):
        raise RequestError(
            f"No image of {store.uri} has a label: extract from folders, shards or a manifest with labels."
        )
    names = sorted(set(labelled["label"].to_pylist())) if names is None else names
    labels = pc.fill_null(pc.index_in(labelled["label"], value_set=pa.array(names, pa.string())), UNKNOWN)
    values = pc.list_flatten(labelled["embedding"]).to_numpy()
    return Labelled(
        embeddings=values.reshape(len(labelled), -1),
        labels=np.asarray(labels, np.int64),
        names=names,
        unlabelled=len(images) - len(labelled),
    )
