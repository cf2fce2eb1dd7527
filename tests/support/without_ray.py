"""The command `dinoray` with Ray and the model left out, for machines too busy to start them and for many runs in
little time.

Listing, plan, fetching, decoding, shards, commits, failures and reports are those of every run. Workers run in the
driver's own process, and descriptors are the colours of the patches, which differ between images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from pipelines import cli
from pipelines.extract import job as extract
from pipelines.extract import layout, stages, streaming
from pipelines.extract.stages import FusedWorker
from pipelines.features.extractor import ExtractorSetup
from pipelines.settings.sections import Config
from pipelines.store.extraction import ShardReport
from pipelines.store.store import Store

PATCH_PIXELS = 8
DIMENSIONS = 3 * PATCH_PIXELS * PATCH_PIXELS


class Colours:
    """In an Extractor's place: a patch is described by its pixels."""

    patch_size, embed_dim, device, precision = PATCH_PIXELS, DIMENSIONS, "none", "exact"

    def __init__(self, setup: ExtractorSetup) -> None:
        pass

    def extract(self, prepared: list[Any]) -> list[Any]:
        return [self._one(image) for image in prepared]

    def _one(self, image: Any) -> Any:
        height, width = (side // PATCH_PIXELS for side in image.pixels.shape[:2])
        tiles = image.pixels[: height * PATCH_PIXELS, : width * PATCH_PIXELS].reshape(
            height, PATCH_PIXELS, width, PATCH_PIXELS, 3
        )
        descriptor = tiles.swapaxes(1, 2).reshape(height, width, DIMENSIONS).astype(np.float32) / 255
        y, x = (axis.astype(np.float32) for axis in np.mgrid[:height, :width])
        return SimpleNamespace(
            descriptor=descriptor,
            extra={},
            saliency=descriptor.mean(-1),
            embedding=descriptor.mean((0, 1)),
            y=y,
            x=x,
            width=image.width,
            height=image.height,
            model_width=width * PATCH_PIXELS,
            model_height=height * PATCH_PIXELS,
        )


def model_facts(config: Config) -> layout.ModelFacts:
    return layout.ModelFacts(PATCH_PIXELS, {"descriptor": DIMENSIONS}, patches=100, depth=1, width=DIMENSIONS)


def stream_reports(
    rows: pa.Table, block_size: int, plan: layout.ExtractionLayout, store: Store, config: Config, run_id: str, **_: Any
) -> Iterator[ShardReport]:
    """As streaming.stream_reports does it, one block after the other."""
    worker = FusedWorker(ExtractorSetup(store.uri, run_id, config, "cpu", store.spec["model"]["weights"], threads=1))
    for begin in range(0, len(rows), block_size):
        for table in worker(rows.slice(begin, block_size)):
            yield from map(ShardReport.from_json, table["report"].to_pylist())


@contextmanager
def ray_session(*_: Any, **__: Any) -> Iterator[dict[str, float]]:
    yield {"CPU": 2.0}


@contextmanager
def model_left_out() -> Iterator[None]:
    """Within: extractions are done in this process, and without a model."""
    with (
        mock.patch.object(streaming, "stream_reports", stream_reports),
        mock.patch.object(layout, "model_facts", model_facts),
        mock.patch.object(stages, "make_extractor", Colours),
    ):
        yield


if __name__ == "__main__":
    vars(extract).update(ray_session=ray_session, JobMetrics=lambda command: None)
    with model_left_out():
        cli.main()
