"""A picture to search with: the vectors that the store's own spec gives it, compared as an index holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dino_ops.errors import ImageError
from dino_ops.nearest import Pooling, pool
from pipelines import storage
from pipelines.errors import RequestError
from pipelines.features.same_features import spec_with_weights, stored_form
from pipelines.features.stored_patches import stored_patches
from pipelines.results.index_vectors import vector_batches
from pipelines.results.indices import Manifest
from pipelines.settings.sections import Config, IndexSettings
from pipelines.store.projection import read_projections
from pipelines.store.store import Store

if TYPE_CHECKING:
    from dino_ops.extractor import ImageFeatures


@dataclass(frozen=True)
class Query:
    """Vectors of one image.

    vectors: (n, D) float32; n is 1 for an index of images, else the patches. cells: row, col, y, x of the patches.
    width, height: pixels of the original. uri: where its bytes are. image_id: its name in the store, if it is there.
    """

    vectors: np.ndarray
    cells: pa.Table | None
    width: int
    height: int
    uri: str
    image_id: str | None = None


def stored_query(store: Store, manifest: Manifest, image_id: str) -> Query:
    """An image of the store, by its id: what was extracted is read, no model runs.

    Raises RequestError when nothing of it is stored.
    """
    row = store.images.rows_with_ids([image_id], ["image_id", "uri", "width", "height", "run_id", "shard"])
    settings = IndexSettings.model_validate({key: value for key, value in manifest.holds.items() if value})
    batch = next(vector_batches(store, settings, row), None)
    if batch is None:
        raise RequestError(f"No patch of {image_id} is stored: give another image.")
    about = row.to_pylist()[0]
    return Query(batch.vectors, batch.cells, about["width"], about["height"], about["uri"], image_id)


def extracted_query(store: Store, manifest: Manifest, image: str, config: Config) -> Query:
    """An image from anywhere, its features extracted in this process.

    Raises RequestError for an image that cannot be read or used, and when the store's weights are not available.
    """
    uri = storage.normalise(image)
    data = read_image(uri, image, config.storage.options)
    spec = spec_with_weights(store, config, "A picture to search with")
    features = _extract(store, spec, data, image)
    if manifest.of == "embeddings":
        assert features.embedding is not None  # the store of an index of embeddings has embeddings
        return Query(features.embedding[None], None, features.width, features.height, uri)
    column = manifest.descriptor or "descriptor"
    projection = read_projections(store.uri, spec).get(column)
    vectors = stored_form(features, column, spec.store.dtype, projection)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    if manifest.of == "pooled":
        pooling: Pooling = "gem" if manifest.pooling == "gem" else "mean"
        kept = vectors[stored_patches(features, spec.store)]
        if not len(kept):
            raise RequestError(f"No patch of {image} is as salient as the store's patches are: give another image.")
        return Query(pool(kept, pooling)[None], None, features.width, features.height, uri)
    grid_height, grid_width = features.y.shape
    row, col = np.divmod(np.arange(grid_height * grid_width), grid_width)
    cells = pa.table({"row": row, "col": col, "y": features.y.reshape(-1), "x": features.x.reshape(-1)})
    return Query(vectors, cells, features.width, features.height, uri)


def in_box(query: Query, box_xyxy: tuple[float, float, float, float]) -> Query:
    """The patches whose centres lie in a box (pixels of the original), or the one nearest to its middle.

    Raises RequestError when the box is not inside the image.
    """
    x0, y0, x1, y1 = box_xyxy
    if not (0 <= x0 < x1 <= query.width and 0 <= y0 < y1 <= query.height):
        raise RequestError(
            f"--box {x0:g},{y0:g},{x1:g},{y1:g} does not lie in the image, which is {query.width} pixels wide and "
            f"{query.height} high: give X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1."
        )
    assert query.cells is not None
    y, x = query.cells["y"].to_numpy(), query.cells["x"].to_numpy()
    inside = np.flatnonzero((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1))
    if not len(inside):
        inside = np.array([np.argmin((x - (x0 + x1) / 2) ** 2 + (y - (y0 + y1) / 2) ** 2)])
    cells = query.cells.take(pa.array(inside))
    return Query(query.vectors[inside], cells, query.width, query.height, query.uri, query.image_id)


def read_image(uri: str, image: str, options: storage.Options) -> bytes:
    """The bytes at `uri`. Raises RequestError when there are none to be had."""
    fs, path = storage.filesystem(uri, options)
    try:
        return fs.cat_file(path)
    except FileNotFoundError:
        raise RequestError(
            f"The image {image} does not exist: give a path, a URI or an image_id of the store."
        ) from None
    except OSError as error:
        raise RequestError(f"The image {image} cannot be read: {error.strerror or error}.") from None


def _extract(store: Store, spec: Config, data: bytes, image: str) -> ImageFeatures:
    from pipelines.features.extractor import ExtractorSetup, make_extractor

    expected = store.spec["model"]["weights"]
    setup = ExtractorSetup(store.uri, "search", spec, spec.model.device, expected, threads=0)
    extractor: Any = make_extractor(setup)
    try:
        return extractor(data)
    except ImageError as error:
        raise RequestError(f"The image {image} cannot be used: {error}.") from None
