"""The tables of a store: their columns, what each means, and how they are encoded.

Only types that DuckDB, Polars, pandas, Spark and Trino all read: no Arrow extension types, no half floats. Half
precision is stored as FLOAT holding rounded values, which BYTE_STREAM_SPLIT and zstd make as small as true halves.

Every column's meaning is written here once; docs/tables.md is made of it (`make docs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyarrow as pa

from pipelines.settings.sections import Config

SCHEMA_VERSION = 1


class Column(NamedTuple):
    """A column of a table. about: its meaning and unit, in Markdown."""

    name: str
    type: pa.DataType
    about: str


class TableDescription(NamedTuple):
    """A table of a store. place: its folder below the store. about: what one row is, in Markdown."""

    place: str
    about: str
    columns: Callable[[Config], Sequence[Column]]


def vector(values: pa.DataType) -> pa.DataType:
    """A list column of `values`, its element named as Parquet and Delta name it."""
    return pa.list_(pa.field("element", values))


def schema_of(columns: Sequence[Column]) -> pa.Schema:
    """The Arrow schema of columns. It leaves out what they are about: field metadata would end in the Delta log."""
    return pa.schema([pa.field(column.name, column.type) for column in columns])


IMAGES_COLUMNS = (
    Column("image_id", pa.string(), "key of the image: its path below INPUT, or the id that a manifest gives it"),
    Column("uri", pa.string(), "where the image was read; inside a container, the container and the member"),
    Column("label", pa.string(), "see [inputs](inputs.md); null where there is none"),
    Column("source_size", pa.int64(), "bytes of the file; of the whole file for an image inside Parquet"),
    Column(
        "source_version",
        pa.string(),
        "etag of the file or of its container, else the modification time in ns",
    ),
    Column("width", pa.int32(), "pixels of the original, after EXIF orientation"),
    Column("height", pa.int32(), "pixels of the original, after EXIF orientation"),
    Column("model_width", pa.int32(), "pixels that the model saw"),
    Column("model_height", pa.int32(), "pixels that the model saw"),
    Column("grid_width", pa.int32(), "columns of the patch grid"),
    Column("grid_height", pa.int32(), "rows of the patch grid"),
    Column("embedding", vector(pa.float32()), "class token after the final norm; null with `features.embedding=false`"),
    Column("shard", pa.string(), "file below `patches/` that holds the image's patches; null where none is stored"),
    Column("run_id", pa.string(), "run of `extract` that wrote the row"),
    Column("extracted_at", pa.timestamp("us", "UTC"), "when its file was written"),
)

FAILURES_COLUMNS = (
    Column("image_id", pa.string(), "as in `images`"),
    Column("uri", pa.string(), "as in `images`"),
    Column("source_version", pa.string(), "as in `images`"),
    Column("stage", pa.string(), "`list`, `fetch`, `decode`, `extract` or `write`"),
    Column("error", pa.string(), "class of the error, such as `ImageError`, `StorageError` or `WorkerDied`"),
    Column("message", pa.string(), "what was wrong, in words"),
    Column("attempts", pa.int32(), "how often it was tried"),
    Column("run_id", pa.string(), "run of `extract` that wrote the row"),
    Column("failed_at", pa.timestamp("us", "UTC"), "when it failed"),
)

PAIRS_COLUMNS = (
    Column("image_a", pa.string(), "image_id; the smaller of the two, except where a file of pairs has them otherwise"),
    Column("image_b", pa.string(), "image_id"),
    Column("score", pa.float32(), "cosine of the embeddings; null where there are none"),
    Column("source", pa.string(), "how the pair was chosen: `knn`, `all` or `file`"),
    Column("mutual", pa.int32(), "mutual nearest neighbours found, in the foreground or not"),
    Column("kept", pa.int32(), "rows of the pair in `matches`; 0 is a result, not an error"),
    Column("shard", pa.string(), "file below `matches/` that holds those rows; null where there are none"),
    Column("run_id_a", pa.string(), "extraction of image_a that was matched; a later one is matched again"),
    Column("run_id_b", pa.string(), "extraction of image_b that was matched; a later one is matched again"),
)

MATCHES_COLUMNS = (
    Column("image_a", pa.string(), "as in `pairs`"),
    Column("image_b", pa.string(), "as in `pairs`"),
    Column("row_a", pa.int32(), "row of the patch in the grid of image_a, from 0"),
    Column("col_a", pa.int32(), "column of the patch in the grid of image_a, from 0"),
    Column("row_b", pa.int32(), "row of the patch in the grid of image_b, from 0"),
    Column("col_b", pa.int32(), "column of the patch in the grid of image_b, from 0"),
    Column("y_a", pa.float32(), "centre of the patch, in pixels of the original of image_a"),
    Column("x_a", pa.float32(), "centre of the patch, in pixels of the original of image_a"),
    Column("y_b", pa.float32(), "centre of the patch, in pixels of the original of image_b"),
    Column("x_b", pa.float32(), "centre of the patch, in pixels of the original of image_b"),
    Column("similarity", pa.float32(), "cosine of the two descriptors (binned where `correspond.binned` is true)"),
    Column("saliency", pa.float32(), "mean of both patches, 0..1"),
    Column("rank", pa.int32(), "0 is the best of the selected matches; -1 for those that `correspond.keep=all` adds"),
)

CENTROIDS_COLUMNS = (
    Column("cluster_id", pa.int32(), "from 0"),
    Column("size", pa.int64(), "rows of the cluster in `assignments`"),
    Column("inertia", pa.float64(), "sum of their distances (cosine) or of their squared distances (euclidean)"),
    Column(
        "salient_votes",
        pa.int64(),
        "images whose patches in the cluster have a mean saliency above `store.salient_threshold`; null for clusters "
        "of images, and where there is no saliency",
    ),
    Column("centroid", vector(pa.float32()), "of unit length with `cluster.metric=cosine`"),
)

ASSIGNMENTS_COLUMNS = (
    Column("image_id", pa.string(), "as in `images`"),
    Column("row", pa.int32(), "row of the patch in the grid; null where images are clustered"),
    Column("col", pa.int32(), "column of the patch in the grid; null where images are clustered"),
    Column("cluster_id", pa.int32(), "as in `centroids`"),
    Column("distance", pa.float32(), "to the centroid: 1 - cosine, or Euclidean"),
    Column("saliency", pa.float32(), "of the patch, as in `patches`; null where there is none"),
    Column("run_id", pa.string(), "extraction that was assigned; a later one is assigned again"),
)

PARTS_IMAGES_COLUMNS = (
    Column("image_id", pa.string(), "as in `images`; once for each set that the image is in"),
    Column("set_id", pa.string(), "label, folder, cluster or set of a file, as `cosegment.sets` says"),
    Column("foreground_fraction", pa.float32(), "fraction of the pixels of `mask_png` that are in a part"),
    # The published method finds parts and foreground each in a way of its own.
    Column(
        "mask_png",
        pa.binary(),
        "parts: PNG of one channel at the original's size, part_id + 1, 0 is background",
    ),
    Column(
        "foreground_png",
        pa.binary(),
        "common foreground: PNG of one channel at the original's size, 255, 0 is background; a part may reach beyond "
        "it and leave some of it out",
    ),
    Column("note", pa.string(), "what was unusual, such as no salient cluster; null for nothing"),
    Column("shard", pa.string(), "file below `patches/` that holds its patches"),
    Column("run_id", pa.string(), "extraction that was segmented; a later one is segmented again"),
    Column("set_version", pa.string(), "hash of the set's images and their extractions; others are segmented again"),
)

PARTS_PATCHES_COLUMNS = (
    Column("image_id", pa.string(), "as in `images`"),
    Column("set_id", pa.string(), "as in the images of the parts"),
    Column("row", pa.int32(), "row of the patch in the grid, from 0"),
    Column("col", pa.int32(), "column of the patch in the grid, from 0"),
    Column("part_id", pa.int32(), "from 0; -1 is background"),
)

IMAGES = schema_of(IMAGES_COLUMNS)
FAILURES = schema_of(FAILURES_COLUMNS)
PAIRS = schema_of(PAIRS_COLUMNS)
MATCHES = schema_of(MATCHES_COLUMNS)
CENTROIDS = schema_of(CENTROIDS_COLUMNS)
ASSIGNMENTS = schema_of(ASSIGNMENTS_COLUMNS)
PARTS_IMAGES = schema_of(PARTS_IMAGES_COLUMNS)
PARTS_PATCHES = schema_of(PARTS_PATCHES_COLUMNS)


# A column has the same type in whatever table it is.
_TYPES = {
    field.name: field.type
    for schema in (IMAGES, FAILURES, PAIRS, MATCHES, CENTROIDS, ASSIGNMENTS, PARTS_IMAGES, PARTS_PATCHES)
    for field in schema
}
_TYPES_IN_VECTORS = (pa.float32(), pa.float64(), pa.int8())


def wrong_type(schema: pa.Schema) -> str:
    """The first column of a file that has another type than columns of its name have, in words; empty where none has.

    Nothing in a Parquet file guards its footer, and one that calls texts bytes, or signed numbers unsigned, would have
    other values read than were written.
    """
    for field in schema:
        if pa.types.is_list(field.type):
            right = field.type.value_type in _TYPES_IN_VECTORS
        else:
            right = field.type == _TYPES.get(field.name, field.type)
        if not right:
            return f"its column {field.name} is of {field.type}"
    return ""


def descriptor_columns(config: Config) -> list[str]:
    """Names of the descriptor columns: `descriptor`, then one for each entry of features.extra."""
    return ["descriptor", *(item.column for item in config.features.extra)]


def scale_column(descriptor: str) -> str:
    """The column with the int8 scale of a descriptor column: `scale`, `scale_key9`."""
    return descriptor.replace("descriptor", "scale", 1)


def patches_columns(config: Config) -> list[Column]:
    """The columns of patches: which descriptors there are and how they are stored depends on the settings."""
    columns = [
        Column("image_id", pa.string(), "as in `images`"),
        Column("row", pa.int32(), "row of the patch in the grid, from 0"),
        Column("col", pa.int32(), "column of the patch in the grid, from 0"),
        Column("y", pa.float32(), "centre of the patch, in pixels of the original image"),
        Column("x", pa.float32(), "centre of the patch, in pixels of the original image"),
        Column("saliency", pa.float32(), "0..1 within the image; null with `features.saliency=false`"),
    ]
    for name in descriptor_columns(config):
        which = "`features.facet` of `features.layer`" if name == "descriptor" else "an entry of `features.extra`"
        about = f"vector of the patch: {which}, projected where `store.pca` is set"
        if config.store.dtype == "int8":
            columns.append(Column(name, vector(pa.int8()), about))
            columns.append(Column(scale_column(name), pa.float32(), f"`{name}` is its int8 values times this"))
        else:
            columns.append(Column(name, vector(pa.float32()), about))
    return columns


def patches_schema(config: Config) -> pa.Schema:
    """One row per stored patch, in raster order within an image."""
    return schema_of(patches_columns(config))


def _always(columns: Sequence[Column]) -> Callable[[Config], Sequence[Column]]:
    return lambda config: columns


TABLES = (
    TableDescription("images", "One row for each image that was extracted.", _always(IMAGES_COLUMNS)),
    TableDescription("patches", "One row for each stored patch, in raster order within an image.", patches_columns),
    TableDescription("failures", "One row for each image that could not be processed.", _always(FAILURES_COLUMNS)),
    TableDescription(
        "clusters/NAME/centroids", "One row for each cluster of a [clustering](cluster.md).", _always(CENTROIDS_COLUMNS)
    ),
    TableDescription(
        "clusters/NAME/assignments",
        "One row for each vector that was clustered: a patch or an image.",
        _always(ASSIGNMENTS_COLUMNS),
    ),
    TableDescription(
        "parts/NAME/images",
        "One row for each image of a set that was [co-segmented](cosegment.md).",
        _always(PARTS_IMAGES_COLUMNS),
    ),
    TableDescription("parts/NAME/patches", "One row for each patch of those images.", _always(PARTS_PATCHES_COLUMNS)),
    TableDescription(
        "matches/NAME/pairs",
        "One row for each pair of images that was [matched](correspond.md).",
        _always(PAIRS_COLUMNS),
    ),
    TableDescription("matches/NAME/matches", "One row for each match of those pairs.", _always(MATCHES_COLUMNS)),
)
