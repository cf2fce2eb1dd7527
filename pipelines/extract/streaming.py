"""Running the stages of an extraction on Ray, and streaming the workers' reports back to the driver."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.errors import JobError, counted
from pipelines.extract.layout import FEWEST_IMAGES_PER_BLOCK, WRITER_SHARE_OF_DECODING_CPUS, ExtractionLayout
from pipelines.extract.stages import (
    THREADS_PER_MODEL_WORKER,
    FusedWorker,
    ModelWorker,
    WriteWorker,
    decode_block,
    extract_each,
    fetch_and_decode,
    pack,
    unpack,
)
from pipelines.features.extractor import ExtractorSetup, make_extractor
from pipelines.running.streams import dataset_of, map_with_actors, map_with_tasks, read_blocks
from pipelines.settings.sections import Config
from pipelines.store import projection, weights
from pipelines.store.extraction import ShardReport
from pipelines.store.schemas import descriptor_columns
from pipelines.store.store import Store
from pipelines.store.vectors import descriptor_map

if TYPE_CHECKING:
    from dino_ops.pca import PCA

# However many workers there are, the driver must keep up.
MOST_REPORTS_TO_DRIVER_PER_SECOND = 50


def stream_reports(
    rows: pa.Table, block_size: int, layout: ExtractionLayout, store: Store, config: Config, run_id: str, *, apart: bool
) -> Generator[ShardReport]:
    """Extract listing rows (with `position`) in blocks and yield what the workers report.

    A block whose worker dies is dropped here: the caller sees that its images are still undone.

    apart: no worker has two blocks at once, so that one which kills its worker takes no other with it.

    Raises:
        JobError: Ray could not do the work at all.
    """
    setup = ExtractorSetup(
        store.uri,
        run_id,
        config,
        layout.device,
        store.spec["model"]["weights"],
        threads=max(1, round(layout.cpus)),
        progress_seconds=max(1.0, layout.workers / MOST_REPORTS_TO_DRIVER_PER_SECOND),
    )
    if config.store.pca is not None and not projection.exists(store.uri, config):
        projection.write_projections(store.uri, config, fit_projections(rows, layout, config, run_id))
    dataset = dataset_of(rows, block_size, report_each=not layout.separate)
    if layout.separate:
        decode = partial(decode_block, setup=setup, patch_size=layout.facts.patch_size)
        dataset = map_with_tasks(dataset, decode, layout.decode_cpus)
        threads = 1 if apart else THREADS_PER_MODEL_WORKER
        dataset = map_with_actors(
            dataset, ModelWorker, setup, layout.workers, layout.cpus, layout.gpus, threads=threads
        )
        # few writers keep up with a model; Ray starts more when blocks wait
        writer_cpus = layout.decode_cpus * WRITER_SHARE_OF_DECODING_CPUS
        dataset = map_with_actors(dataset, WriteWorker, setup, (1, 4 * layout.workers), writer_cpus)
    else:
        dataset = map_with_actors(dataset, FusedWorker, setup, layout.workers, layout.cpus, layout.gpus)
    for block in read_blocks(dataset):
        for text in block["report"].to_pylist():
            yield ShardReport.from_json(text)


def fit_projections(rows: pa.Table, layout: ExtractionLayout, config: Config, run_id: str) -> dict[str, PCA]:
    """The PCA that store.pca asks for, by descriptor column, fitted on patches of a sample of the images.

    Raises JobError where the sample has too few patches.
    """
    from dino_ops.pca import fit_pca

    setup = ExtractorSetup("", run_id, config, layout.device, weights.identity(config), max(1, round(layout.cpus)))
    count = projection.images_to_fit(config, len(rows))
    sample = rows.take(pa.array(np.linspace(0, len(rows) - 1, count).astype(np.int64)))
    dataset = dataset_of(sample, max(1, min(FEWEST_IMAGES_PER_BLOCK, count // layout.workers)), report_each=False)
    dataset = map_with_actors(dataset, SampleWorker, setup, layout.workers, layout.cpus, layout.gpus)
    parts = [unpack(block) for block in read_blocks(dataset)]
    dimensions = config.store.pca
    assert dimensions is not None
    fitted = {}
    for column in descriptor_columns(config):
        found = [part[column] for part in parts if column in part]
        vectors = np.concatenate(found) if found else np.zeros((0, 0), np.float32)
        if len(vectors) < dimensions:
            raise JobError(
                f"store.pca={dimensions} needs at least as many patches, but the sample of {counted(count, 'image')} "
                f"gave {len(vectors):,}: give a smaller store.pca, or more readable images."
            )
        fitted[column] = fit_pca(vectors, dimensions, seed=0)
    return fitted


class SampleWorker:
    """Descriptors of a few patches of each image, for fitting the PCA."""

    def __init__(self, setup: ExtractorSetup) -> None:
        self.setup = setup
        self.extractor = make_extractor(setup)

    def __call__(self, block: pa.Table) -> pa.Table:
        decoded = fetch_and_decode(block, self.setup, self.extractor.patch_size)
        features = extract_each(self.extractor, decoded, self.setup.run_id) if decoded.prepared else []
        per_image = max(1, projection.PATCHES_OF_ALL_SAMPLE_IMAGES // projection.SAMPLE_IMAGES)
        picked: dict[str, list[np.ndarray]] = {}
        for source, one in zip(decoded.sources, features, strict=True):
            for column in descriptor_columns(self.setup.config):
                vectors = descriptor_map(one, column)
                vectors = vectors.reshape(-1, vectors.shape[-1])
                chosen = np.random.default_rng(source["position"]).permutation(len(vectors))[:per_image]
                picked.setdefault(column, []).append(vectors[chosen])
        return pack({column: np.concatenate(vectors) for column, vectors in picked.items()})
