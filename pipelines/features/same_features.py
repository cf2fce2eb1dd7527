"""Features of further pictures that compare with those of a store: its own spec and weights, and its rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.errors import RequestError
from pipelines.settings.sections import Config
from pipelines.store import weights
from pipelines.store.store import Store
from pipelines.store.vectors import decode, descriptor_map, encode

if TYPE_CHECKING:
    from dino_ops.extractor import ImageFeatures
    from dino_ops.pca import PCA


def spec_with_weights(store: Store, config: Config, what: str) -> Config:
    """The store's settings with weights that this machine has.

    what: the thing that needs the model, for messages, such as "A picture to search with".

    Raises RequestError when they are missing, or are not the store's.
    """
    expected = store.spec["model"]["weights"]
    given = config.model.weights
    asked = store.config.model_copy(update={"model": store.config.model.model_copy(update={"weights": given})})
    if expected == "pretrained" or expected.startswith("random:"):
        given = expected.partition(":")[0]
    elif weights.is_packaged(asked):
        if (found := weights.identity(asked)) != expected:
            raise RequestError(
                f"{what} needs the model, and the store was made with other weights ({expected[:15]}...) than those "
                f"of {asked.model.name} that come with this dinoray ({found[:15]}...): give its own with --set "
                "model.weights=FILE, or extract into a new STORE."
            )
    elif given in weights.NAMED_WEIGHTS:
        raise RequestError(
            f"{what} needs the model, and the store was made with a weights file "
            f"({expected[:15]}...): give it again with --set model.weights=FILE, so that features compare."
        )
    elif (found := weights.identity(config)) != expected:
        raise RequestError(
            f"The weights {given} ({found[:15]}...) are not those of the store ({expected[:15]}...): give the same "
            "file with --set model.weights=FILE, so that features compare."
        )
    own = {"weights": given, "device": config.model.device, "compile": config.model.compile}
    return store.config.model_copy(update={"model": store.config.model.model_copy(update=own)})


def stored_form(features: ImageFeatures, column: str, dtype: str, projection: PCA | None) -> np.ndarray:
    """A descriptor column of features as a store would give it back: projected and rounded, (gh, gw, D) float32."""
    found = descriptor_map(features, column)
    rows = found.reshape(-1, found.shape[-1])
    if projection is not None:
        rows = projection.transform(rows)
    columns = encode(np.ascontiguousarray(rows, np.float32), dtype)
    stored = decode(pa.table(columns, names=["descriptor", "scale"][: len(columns)]), "descriptor")
    return stored.reshape(*found.shape[:2], -1)
