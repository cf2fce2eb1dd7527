"""A store as dinoray 0.1.0 left it, written with pyarrow, numpy and deltalake alone: no transactions, no checksums in
pages or files, a commit a table.

Its images are those of folders that the simulation extracts (simulated_jobs.INPUTS), with the same features, so that
jobs that go on with it must come to what they come to in a store of today.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.transaction import AddAction
from PIL import Image

PATCH_PIXELS = 8
VECTOR = pa.list_(pa.field("element", pa.float32()))
IMAGES = pa.schema(
    [
        *((name, pa.string()) for name in ("image_id", "uri", "label")),
        ("source_size", pa.int64()),
        ("source_version", pa.string()),
        *((name, pa.int32()) for name in ("width", "height", "model_width", "model_height")),
        *((name, pa.int32()) for name in ("grid_width", "grid_height")),
        ("embedding", VECTOR),
        ("shard", pa.string()),
        ("run_id", pa.string()),
        ("extracted_at", pa.timestamp("us", "UTC")),
    ]
)
PATCHES = pa.schema(
    [
        ("image_id", pa.string()),
        *((name, pa.int32()) for name in ("row", "col")),
        *((name, pa.float32()) for name in ("y", "x", "saliency")),
        ("descriptor", VECTOR),
    ]
)
FAILURES = pa.schema(
    [
        *((name, pa.string()) for name in ("image_id", "uri", "source_version", "stage", "error", "message")),
        ("attempts", pa.int32()),
        ("run_id", pa.string()),
        ("failed_at", pa.timestamp("us", "UTC")),
    ]
)
CENTROIDS = pa.schema(
    [
        ("cluster_id", pa.int32()),
        ("size", pa.int64()),
        ("inertia", pa.float64()),
        ("salient_votes", pa.int64()),
        ("centroid", VECTOR),
    ]
)
ASSIGNMENTS = pa.schema(
    [
        ("image_id", pa.string()),
        *((name, pa.int32()) for name in ("row", "col", "cluster_id")),
        *((name, pa.float32()) for name in ("distance", "saliency")),
        ("run_id", pa.string()),
    ]
)
SPEC: dict[str, Any] = {
    "model": {"name": "vit_tiny_patch16_224", "weights": "random:0", "precision": "auto"},
    "image": {
        "shorter_side": 16,
        "size": None,
        "native": False,
        "resample": "lanczos",
        "crop": "none",
        "max_pixels": 178956970,
        "mean": None,
        "std": None,
    },
    "features": {
        "layer": 11,
        "facet": "key",
        "extra": [],
        "stride": None,
        "final_norm": False,
        "position": "dino",
        "saliency_heads": "all",
        "channel_order": "head_major",
        "saliency": True,
        "embedding": True,
        "rope": "before",
    },
    "store": {"dtype": "float16", "pca": None, "patches": "all", "every": 1, "salient_threshold": 0.065},
}
FINGERPRINT = "05b68b8176f30677"
SALIENT_ABOVE = 0.065
# What the published centroids of three colours are told apart by.
MOST_LIKE: tuple[tuple[int, int, int], ...] = ((230, 40, 40), (20, 150, 20), (10, 10, 90))


def write_old_store(folder: Path, inputs: Iterable[Path], broken: dict[str, str]) -> Path:
    """A store with a shard and a commit for each folder of images, with failures, and with clusters `words`.

    broken: image_id -> folder of a file that is no image.
    """
    folder.mkdir()
    about = {
        "schema_version": 1,
        "fingerprint": FINGERPRINT,
        "spec": SPEC,
        "created_at": "2026-05-01T10:00:00+00:00",
        "created_by": "dinoray 0.1.0",
    }
    (folder / "store.json").write_text(json.dumps(about, indent=2))
    for name, schema in (("images", IMAGES), ("patches", PATCHES), ("failures", FAILURES)):
        _create(folder / name, schema)
    patches = []
    for number, source in enumerate(inputs, 1):
        run_id = f"2026050{number}T100000Z-00000{number}"
        shard = _file_name(run_id)
        paths = sorted(path for path in source.rglob("*.png") if path.relative_to(source).as_posix() not in broken)
        found = [_extracted(path, source, run_id, shard) for path in paths]
        patches += [(rows, run_id) for _, rows in found]
        _write(folder / "patches", shard, [row for _, rows in found for row in rows], PATCHES, run_id)
        _write(folder / "images", shard, [image for image, _ in found], IMAGES, run_id)
    failed = [_failed(Path(path) / image_id, image_id, "20260502T100000Z-000002") for image_id, path in broken.items()]
    _write(folder / "failures", _file_name("20260502T100000Z-000002"), failed, FAILURES, "20260502T100000Z-000002")
    _cluster(folder, patches)
    return folder


def _extracted(path: Path, source: Path, run_id: str, shard: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of images, and its rows of patches."""
    pixels = np.asarray(Image.open(path))
    height, width = (side // PATCH_PIXELS for side in pixels.shape[:2])
    tiles = pixels.reshape(height, PATCH_PIXELS, width, PATCH_PIXELS, 3).swapaxes(1, 2)
    vectors = tiles.reshape(height * width, -1).astype(np.float32) / 255
    image_id = path.relative_to(source).as_posix()
    image = {
        "image_id": image_id,
        "uri": str(path),
        "label": path.parent.name,
        "shard": shard,
        "run_id": run_id,
        "source_size": path.stat().st_size,
        "source_version": str(path.stat().st_mtime_ns),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "grid_width": width,
        "grid_height": height,
        "model_width": pixels.shape[1],
        "model_height": pixels.shape[0],
        "embedding": vectors.mean(0),
        "extracted_at": 0,
    }
    rows = [
        {
            "image_id": image_id,
            "row": at // width,
            "col": at % width,
            "y": at // width,
            "x": at % width,
            "saliency": vector.mean(),
            "descriptor": vector.astype(np.float16).astype(np.float32),
        }
        for at, vector in enumerate(vectors)
    ]
    return image, rows


def _failed(path: Path, image_id: str, run_id: str) -> dict[str, Any]:
    facts = {"uri": str(path), "source_version": str(path.stat().st_mtime_ns), "attempts": 1, "failed_at": 0}
    return {"image_id": image_id, **facts, "stage": "decode", "error": "ImageError", "message": "-", "run_id": run_id}


def _cluster(folder: Path, patches: list[tuple[list[dict[str, Any]], str]]) -> None:
    """Clusters of all patches by their colours, as spherical k-means ends: centroids are the mean directions."""
    training = "20260503T100000Z-000003"
    rows = [row | {"run_id": run_id} for of_image, run_id in patches for row in of_image]
    vectors = np.stack([row["descriptor"] for row in rows]).astype(np.float64)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    colours = np.array(MOST_LIKE, float).repeat(PATCH_PIXELS**2, 0).reshape(len(MOST_LIKE), -1)
    labels = (units @ (colours / np.linalg.norm(colours, axis=1, keepdims=True)).T).argmax(1)
    centroids = np.stack([units[labels == label].mean(0) for label in range(len(MOST_LIKE))])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    distances = 1 - (units * centroids[labels]).sum(1)
    _create(folder / "clusters/words/assignments", ASSIGNMENTS)
    _create(folder / "clusters/words/centroids", CENTROIDS)
    assigned = [
        {**{name: row[name] for name in ("image_id", "row", "col", "saliency", "run_id")}, "cluster_id": label}
        | {"distance": distance}
        for row, label, distance in zip(rows, labels.tolist(), distances.tolist(), strict=True)
    ]
    clusters = []
    for label, centroid in enumerate(centroids):
        inertia, size = distances[labels == label].sum(), int((labels == label).sum())
        votes = sum(_is_salient(assigned, image_id, label) for image_id in {row["image_id"] for row in rows})
        clusters.append({"cluster_id": label, "size": size, "inertia": inertia, "salient_votes": votes})
        clusters[-1]["centroid"] = centroid.astype(np.float32)
    _write(folder / "clusters/words/centroids", _file_name(training), clusters, CENTROIDS, training)
    _write(folder / "clusters/words/assignments", _file_name(training), assigned, ASSIGNMENTS, training)
    settings = {"k": 3, "elbow": None, "of": "patches", "descriptor": "descriptor", "metric": "cosine"}
    settings |= {"salient_only": False, "sample": None, "iterations": 50, "tolerance": 0.0001, "seed": 0, "levels": 1}
    progress = {"schema_version": 1, "levels": 1, "run_id": training, "settings": settings, "ks": [3], "level": 0}
    progress |= {"images": hashlib.sha256(b"of then").hexdigest(), "iteration": 2, "trained": True, "converged": True}
    progress |= {"objectives": [distances.mean()] * 2, "vectors": len(rows), "trained_on": len(rows)}
    progress |= {"mean_distance": distances.mean(), "messages": []}
    content = io.BytesIO()
    np.savez(content, about=np.array(json.dumps(progress)), centroids0=centroids)
    (folder / "clusters/words/model").mkdir()
    (folder / f"clusters/words/model/{training}.npz").write_bytes(content.getvalue())


def _is_salient(assigned: list[dict[str, Any]], image_id: str, label: int) -> bool:
    found = [row["saliency"] for row in assigned if (row["image_id"], row["cluster_id"]) == (image_id, label)]
    return bool(found) and float(np.mean(found)) > SALIENT_ABOVE


def _file_name(run_id: str) -> str:
    return f"part-{run_id}-{uuid.uuid4().hex[:12]}.parquet"


def _create(table: Path, schema: pa.Schema) -> None:
    DeltaTable.create(
        str(table),
        schema=schema,
        mode="ignore",
        configuration={"delta.dataSkippingStatsColumns": schema.names[0]},
    )


def _write(table: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema, run_id: str) -> None:
    """A file and a commit of it; rows in the order of their first column."""
    key = schema.names[0]
    written = pa.Table.from_pylist(rows, schema=schema)
    lists = [field.name for field in schema if pa.types.is_list(field.type)]
    pq.write_table(
        written,
        table / name,
        compression="zstd",
        compression_level=1,
        use_dictionary=[field.name for field in schema if pa.types.is_string(field.type)],
        use_byte_stream_split=[f"{column}.list.element" for column in lists],
        write_statistics=[field.name for field in schema if field.name not in lists],
        store_schema=False,
    )
    keys = written[key].to_pylist()
    statistics = {"numRecords": len(keys), "minValues": {key: min(keys)}, "maxValues": {key: max(keys)}}
    action = AddAction(
        name, (table / name).stat().st_size, {}, 0, True, json.dumps(statistics | {"nullCount": {key: 0}})
    )
    delta = DeltaTable(str(table))
    delta.create_write_transaction(
        [action],
        mode="append",
        schema=delta.schema(),
        partition_by=[],
        commit_properties=CommitProperties(
            max_commit_retries=0, custom_metadata={"run_id": run_id, "commit_id": uuid.uuid4().hex}
        ),
    )
