"""Extraction as one would write it in an afternoon: a PyTorch DataLoader, the model, Parquet at the end of each batch.

The same decoding, the same features and the same files as dinoray's, without resuming, failures or commits.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from dino_ops import Extractor
from dino_ops.images import ImageSpec, PreparedImage, prepare_image
from pipelines.settings.sections import Config
from pipelines.store.parquet import parquet_options
from pipelines.store.schemas import patches_schema

BATCH = 16


class Photos(Dataset[PreparedImage]):
    def __init__(self, paths: list[Path], patch_size: int) -> None:
        self.paths, self.patch_size = paths, patch_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> PreparedImage:
        return prepare_image(self.paths[index].read_bytes(), ImageSpec(), self.patch_size)


def images_per_second(extractor: Extractor, folder: Path, target: Path, threads: int) -> float:
    """Steady rate over all photographs of a folder, from the second batch on; files go below `target`."""
    torch.set_num_threads(threads)
    paths = sorted(folder.iterdir())
    photos = Photos(paths, extractor.patch_size)
    loader: Any = DataLoader(photos, BATCH, num_workers=threads, collate_fn=list)
    schema = patches_schema(Config())
    target.mkdir(parents=True, exist_ok=True)
    done, began = 0, 0.0
    with pq.ParquetWriter(target / "patches.parquet", schema, **parquet_options(schema)) as writer:
        for prepared in loader:
            features = extractor.extract(prepared)
            tables = [_rows(paths[done + i].name, one) for i, one in enumerate(features)]
            writer.write_table(pa.concat_tables(tables).cast(schema))
            done += len(prepared)
            began = began or time.perf_counter()
    return (done - BATCH) / (time.perf_counter() - began)


def _rows(image_id: str, one: Any) -> pa.Table:
    height, width, channels = one.descriptor.shape
    rows, cols = np.indices((height, width), dtype=np.int32)
    halves = one.descriptor.astype(np.float16).astype(np.float32)
    offsets = np.arange(0, (height * width + 1) * channels, channels, dtype=np.int32)
    return pa.table(
        {
            "image_id": pa.array([image_id] * (height * width)),
            "row": rows.ravel(),
            "col": cols.ravel(),
            "y": one.y.ravel(),
            "x": one.x.ravel(),
            "saliency": one.saliency.ravel(),
            "descriptor": pa.ListArray.from_arrays(pa.array(offsets), pa.array(halves.ravel())),
        }
    )
