"""The tables of a store: their columns, what each means, and how they are encoded (DESIGN.md section 2).

Only types that DuckDB, Polars, pandas, Spark and Trino all read: no Arrow extension types, no half floats. Half
precision is stored as FLOAT holding rounded values, which BYTE_STREAM_SPLIT and zstd make as small as true halves.
"""

from __future__ import annotations

import pyarrow as pa

from pipelines.settings.sections import Config

SCHEMA_VERSION = 1


def vector(values: pa.DataType) -> pa.DataType:
    """A list column of `values`, its element named as Parquet and Delta name it."""
    return pa.list_(pa.field("element", values))


IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string()),  # key relative to INPUT, or the manifest's id
        pa.field("uri", pa.string()),
        pa.field("label", pa.string()),
        pa.field("source_size", pa.int64()),  # bytes
        pa.field("source_version", pa.string()),  # etag, else mtime in ns
        pa.field("width", pa.int32()),  # pixels of the original, after EXIF orientation
        pa.field("height", pa.int32()),
        pa.field("model_width", pa.int32()),  # pixels that the model saw
        pa.field("model_height", pa.int32()),
        pa.field("grid_width", pa.int32()),  # patches
        pa.field("grid_height", pa.int32()),
        pa.field("embedding", vector(pa.float32())),  # CLS token after the final norm
        pa.field("shard", pa.string()),  # file under patches/ that holds its patches
        pa.field("run_id", pa.string()),
        pa.field("extracted_at", pa.timestamp("us", "UTC")),
    ]
)

FAILURES = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("uri", pa.string()),
        pa.field("source_version", pa.string()),
        pa.field("stage", pa.string()),  # list | fetch | decode | extract | write
        pa.field("error", pa.string()),  # class name
        pa.field("message", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("run_id", pa.string()),
        pa.field("failed_at", pa.timestamp("us", "UTC")),
    ]
)

PAIRS = pa.schema(
    [
        pa.field("image_a", pa.string()),
        pa.field("image_b", pa.string()),
        pa.field("score", pa.float32()),  # cosine of the embeddings; null where there are none
        pa.field("source", pa.string()),  # knn | all | file: how the pair was chosen
        pa.field("mutual", pa.int32()),  # mutual nearest neighbours found, in the foreground or not
        pa.field("kept", pa.int32()),  # rows of the pair in matches
        pa.field("shard", pa.string()),  # file under matches/ that holds them; null for none
        pa.field("run_id_a", pa.string()),  # of the extraction that was matched: another one is matched anew
        pa.field("run_id_b", pa.string()),
    ]
)

MATCHES = pa.schema(
    [
        pa.field("image_a", pa.string()),
        pa.field("image_b", pa.string()),
        pa.field("row_a", pa.int32()),  # of the patch grid
        pa.field("col_a", pa.int32()),
        pa.field("row_b", pa.int32()),
        pa.field("col_b", pa.int32()),
        pa.field("y_a", pa.float32()),  # patch centre in pixels of the original image
        pa.field("x_a", pa.float32()),
        pa.field("y_b", pa.float32()),
        pa.field("x_b", pa.float32()),
        pa.field("similarity", pa.float32()),  # cosine
        pa.field("saliency", pa.float32()),  # mean of both patches, 0..1
        pa.field("rank", pa.int32()),  # 0 = best of the selected ones; -1 for the others that keep=all adds
    ]
)

CENTROIDS = pa.schema(
    [
        pa.field("cluster_id", pa.int32()),
        pa.field("size", pa.int64()),  # rows in assignments
        pa.field("inertia", pa.float64()),  # sum of their distances (cosine) or squared distances (euclidean)
        pa.field("salient_votes", pa.int64()),  # images whose patches in the cluster are salient on average; or null
        pa.field("centroid", vector(pa.float32())),  # of unit length for metric cosine
    ]
)

ASSIGNMENTS = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("row", pa.int32()),  # of the patch grid; null when images are clustered
        pa.field("col", pa.int32()),
        pa.field("cluster_id", pa.int32()),
        pa.field("distance", pa.float32()),  # to the centroid: 1 - cosine, or Euclidean
        pa.field("saliency", pa.float32()),  # of the patch, as in patches; null where there is none
        pa.field("run_id", pa.string()),  # of the extraction: another one is assigned anew
    ]
)

PARTS_IMAGES = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("set_id", pa.string()),
        pa.field("foreground_fraction", pa.float32()),  # of the pixels of mask_png that are in a part
        # PNGs of one channel at the original's size. The published method finds parts and foreground each in a way of
        # its own, so a part may reach beyond the foreground and leave some of it out
        pa.field("mask_png", pa.binary()),  # parts: part_id + 1, 0 = background
        pa.field("foreground_png", pa.binary()),  # the common foreground: 255, 0 = background
        pa.field("note", pa.string()),  # what was unusual, such as no salient cluster; null for nothing
        pa.field("shard", pa.string()),  # file under patches/ that holds its patches
        pa.field("run_id", pa.string()),  # of the extraction: another one is segmented anew
        pa.field("set_version", pa.string()),  # of the set's images and their extractions: others are segmented anew
    ]
)

PARTS_PATCHES = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("set_id", pa.string()),
        pa.field("row", pa.int32()),  # of the patch grid
        pa.field("col", pa.int32()),
        pa.field("part_id", pa.int32()),  # -1 = background
    ]
)


def descriptor_columns(config: Config) -> list[str]:
    """Names of the descriptor columns: `descriptor`, then one for each entry of features.extra."""
    return ["descriptor", *(item.column for item in config.features.extra)]


def scale_column(descriptor: str) -> str:
    """The column with the int8 scale of a descriptor column: `scale`, `scale_key9`."""
    return descriptor.replace("descriptor", "scale", 1)


def patches_schema(config: Config) -> pa.Schema:
    """One row per stored patch, in raster order within an image."""
    fields = [
        pa.field("image_id", pa.string()),
        pa.field("row", pa.int32()),
        pa.field("col", pa.int32()),
        pa.field("y", pa.float32()),  # patch centre in pixels of the original image
        pa.field("x", pa.float32()),
        pa.field("saliency", pa.float32()),  # 0..1 within the image
    ]
    for column in descriptor_columns(config):
        if config.store.dtype == "int8":
            fields += [pa.field(column, vector(pa.int8())), pa.field(scale_column(column), pa.float32())]
        else:
            fields.append(pa.field(column, vector(pa.float32())))
    return pa.schema(fields)
