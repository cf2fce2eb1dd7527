"""The PCA of a store (`store.pca`): fitted once on a sample of the first run's images, then part of the store.

`projection/projection.parquet` has a row for the mean (component -1) and one per component of every descriptor column,
so that anyone can project a query or reconstruct an approximation with one matrix product.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.settings.sections import Config
from pipelines.store.damage import DamagedResult
from pipelines.store.parquet import open_parquet
from pipelines.store.schemas import vector

if TYPE_CHECKING:
    from dino_ops.pca import PCA


SAMPLE_IMAGES = 512
PATCHES_OF_ALL_SAMPLE_IMAGES = 65_536

_SCHEMA = pa.schema(
    [
        ("descriptor_column", pa.string()),
        ("component", pa.int32()),
        ("explained_variance", pa.float64()),
        pa.field("vector", vector(pa.float64())),
    ]
)


def projection_uri(store: str) -> str:
    return storage.join(store, "projection", "projection.parquet")


def images_to_fit(config: Config, images: int) -> int:
    """How many of so many images a PCA is fitted on; they pass through the model once more than the others."""
    return min(images, SAMPLE_IMAGES) if config.store.pca is not None else 0


def exists(store: str, config: Config) -> bool:
    fs, path = storage.filesystem(projection_uri(store), config.storage.options)
    return fs.exists(path)


def read_projections(store: str, config: Config) -> dict[str, PCA]:
    """The store's PCA by descriptor column; empty when the spec asks for none.

    Raises JobError when the spec asks for one and the file is missing.
    """
    if config.store.pca is None:
        return {}
    from dino_ops.pca import PCA

    try:
        with open_parquet(projection_uri(store), config.storage.options) as parquet:
            table = parquet.read()
    except FileNotFoundError:
        raise DamagedResult(
            f"{projection_uri(store)} is missing: the store cannot be extended without its PCA."
        ) from None
    found = {}
    for column in dict.fromkeys(table["descriptor_column"].to_pylist()):
        rows = sorted((r for r in table.to_pylist() if r["descriptor_column"] == column), key=lambda r: r["component"])
        found[column] = PCA(
            mean=np.array(rows[0]["vector"]),
            components=np.array([row["vector"] for row in rows[1:]]),
            explained_variance=np.array([row["explained_variance"] for row in rows[1:]]),
        )
    return found


def write_projections(store: str, config: Config, projections: dict[str, PCA]) -> None:
    """Write the PCA unless another run was first; all runs then use what is there."""
    rows: list[dict[str, Any]] = []
    for column, pca in projections.items():
        about: dict[str, Any] = {"descriptor_column": column}
        rows.append({**about, "component": -1, "explained_variance": None, "vector": pca.mean})
        rows += [
            {**about, "component": index, "explained_variance": float(variance), "vector": component}
            for index, (component, variance) in enumerate(zip(pca.components, pca.explained_variance, strict=True))
        ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, write_page_checksum=True)
    storage.write_once(projection_uri(store), buffer.getvalue(), config.storage.options)
