"""Laying out an extraction on a Ray cluster, and streaming the workers' reports back to the driver."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import projection, weights
from pipelines.config import Config
from pipelines.errors import JobError, RequestError
from pipelines.ray_session import explain_ray_error
from pipelines.schemas import descriptor_columns
from pipelines.shards import ShardReport, descriptor_map
from pipelines.stages import (
    MODEL_THREADS,
    FusedWorker,
    ModelWorker,
    WorkerSetup,
    WriteWorker,
    decode_block,
    extract_each,
    fetch_and_decode,
    make_extractor,
    pack,
    unpack,
)
from pipelines.store import Store

SHARD_BYTES = 256 * 2**20  # of stored descriptors: in the middle of the 128-512 MB aimed at on big runs
BYTES_PER_VALUE = {"float16": 1.91, "float32": 3.81, "int8": 0.89}  # measured, zstd
BLOCKS_PER_WORKER = 4  # so that workers finish together
WRITER_SHARE = 0.5  # of a decoding task's CPUs: compressing releases the CPU while it waits for the disk
FEWEST_IMAGES = 32  # a block below this is not worth a file, while every worker has one
REPORTS_PER_SECOND = 50  # that the driver should see at most, whatever the number of workers
CPUS_OF_A_WORKER = 4.0
WORKER_START_SECONDS = 4.0  # of a CPU: importing torch, reading weights
GFLOP_A_CPU_SECOND = 50.0  # float32, one core
READING_THREADS, READING_THREADS_SECONDS = "iter_threaded", 10.0  # Ray Data's, by name
NO_PROGRESS_SECONDS = 1800  # a Ray that does nothing for this long is stuck, not slow


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model."""

    patch_size: int
    dims: dict[str, int]  # descriptor column -> values a patch, before PCA
    patches: int  # of a typical image
    depth: int
    width: int  # channels of a token

    @property
    def gflop(self) -> float:
        """Of a typical image, in a whole forward pass."""
        return self.gflop_of(self.patches)

    def gflop_of(self, patches: float) -> float:
        """Of an image with so many patches.

        A block's products: 12 width^2 weights (qkv 3, projection 1, MLP 8) for each token, tokens with tokens twice.
        """
        return self.depth * (24 * patches * self.width**2 + 4 * patches**2 * self.width) / 1e9


@dataclass(frozen=True)
class Layout:
    """How the work is spread."""

    device: str
    workers: int
    cpus: float  # of a worker
    gpus: float
    block_size: int  # images
    separate: bool  # decoding and writing run apart from the model
    decode_cpus: float  # of a decoding task, where it runs apart
    facts: ModelFacts


def model_facts(config: Config) -> ModelFacts:
    """Build the model on the CPU and say what planning needs. Raises ModelError for anything that does not fit."""
    on_cpu = config.model.model_copy(update={"precision": "auto", "compile": False})
    config = config.model_copy(update={"model": on_cpu})
    extractor = make_extractor(WorkerSetup("", "", config, "cpu", weights.identity(config), threads=0))
    dims = dict.fromkeys(descriptor_columns(config), extractor.embed_dim)
    for column, dim in dims.items():
        if config.store.pca is not None and config.store.pca > dim:
            raise RequestError(f"store.pca is {config.store.pca}, but {column} has only {dim} dimensions: give fewer.")
    height, width = config.image.size or (side := config.image.shorter_side or 512, side * 4 // 3)
    grid_height, grid_width = extractor.grid(height, width)
    patches = grid_height * grid_width
    return ModelFacts(extractor.patch_size, dims, patches, extractor.depth, extractor.embed_dim)


def plan_workers(resources: dict[str, float], config: Config, facts: ModelFacts, images: int) -> Layout:
    """Workers and block size for a cluster with `resources` ({"CPU": ..., "GPU": ...}).

    Raises RequestError when what was asked is not there.
    """
    run = config.run
    total_cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
    if config.model.device == "cuda" and not gpus:
        raise RequestError("model.device is cuda, but the Ray cluster has no GPU: give model.device=auto or cpu.")
    device = "cuda" if config.model.device != "cpu" and gpus else "cpu"
    separate = device == "cuda" if run.stages == "auto" else run.stages == "separate"
    # Ray waits for ever when the models' actors leave no CPU to the stages before and after them.
    decode_cpus = min(1.0, total_cpus / 4) if separate else 0.0
    cpus = total_cpus - decode_cpus * (1 + WRITER_SHARE)
    if device == "cuda":
        gpus_each = run.gpus_per_worker or 1.0
        workers = run.workers or max(1, int(gpus / gpus_each))
        cpus_each = run.cpus_per_worker or min(1.0, cpus / workers)
    else:
        gpus_each = 0.0
        most = max(1, int(cpus / (run.cpus_per_worker or _threads_of_a_cpu_worker(cpus))))
        workers = run.workers or min(most, _workers_worth_starting(images, facts))
        cpus_each = run.cpus_per_worker or (cpus / workers if run.workers else min(cpus / workers, CPUS_OF_A_WORKER))
    if gpus_each * workers > gpus or cpus_each * workers > cpus + 1e-6:
        raise RequestError(
            f"{workers} workers with {cpus_each:g} CPUs and {gpus_each:g} GPUs each were asked for, but the cluster "
            f"has {cpus:g} CPUs to give and {gpus:g} GPUs: give smaller run.workers, run.cpus_per_worker or "
            "run.gpus_per_worker."
        )
    block_size = run.images_per_shard or _block_size(config, facts, images, workers)
    workers = min(workers, math.ceil(images / block_size))
    return Layout(device, workers, cpus_each, gpus_each, block_size, separate, decode_cpus, facts)


def _threads_of_a_cpu_worker(cpus: float) -> float:
    """One thread each scales best, but every worker holds a model: on larger machines four threads share one."""
    return min(1.0, cpus) if cpus <= CPUS_OF_A_WORKER else CPUS_OF_A_WORKER


def _workers_worth_starting(images: int, facts: ModelFacts) -> int:
    """A handful of small images is done before a second worker has loaded its libraries."""
    return max(1, math.ceil(images * facts.gflop / GFLOP_A_CPU_SECOND / WORKER_START_SECONDS))


def _block_size(config: Config, facts: ModelFacts, images: int, workers: int) -> int:
    values = sum(min(dim, config.store.pca or dim) for dim in facts.dims.values()) * facts.patches / config.store.every
    largest = max(1, int(SHARD_BYTES / (values * BYTES_PER_VALUE[config.store.dtype])))
    fair = math.ceil(images / (workers * BLOCKS_PER_WORKER))
    smallest = min(FEWEST_IMAGES, math.ceil(images / workers))
    return max(1, min(largest, max(fair, smallest)))


def stream_reports(
    rows: pa.Table, block_size: int, layout: Layout, store: Store, config: Config, run_id: str, *, apart: bool
) -> Generator[ShardReport]:
    """Extract listing rows (with `position`) in blocks and yield what the workers report.

    A block whose worker dies is dropped here: the caller sees that its images are still undone.

    apart: no worker has two blocks at once, so that one which kills its worker takes no other with it.

    Raises:
        JobError: Ray could not do the work at all.
    """
    setup = WorkerSetup(
        store.uri,
        run_id,
        config,
        layout.device,
        store.spec["model"]["weights"],
        threads=max(1, round(layout.cpus)),
        progress_seconds=max(1.0, layout.workers / REPORTS_PER_SECOND),
    )
    if config.store.pca is not None and not projection.exists(store.uri, config):
        _fit_projection(rows, layout, setup, store)
    dataset = _dataset(rows, block_size, report_each=not layout.separate)
    if layout.separate:
        decode = partial(decode_block, setup=setup, patch_size=layout.facts.patch_size)
        with _without_deprecation_warning():
            dataset = dataset.map_batches(
                decode, batch_size=None, batch_format="pyarrow", num_cpus=layout.decode_cpus, max_retries=0
            )
        threads = 1 if apart else MODEL_THREADS
        dataset = _map_with_actors(
            dataset, ModelWorker, setup, layout.workers, layout.cpus, layout.gpus, threads=threads
        )
        # few writers keep up with a model; Ray starts more when blocks wait
        writer_cpus = layout.decode_cpus * WRITER_SHARE
        dataset = _map_with_actors(dataset, WriteWorker, setup, (1, 4 * layout.workers), writer_cpus)
    else:
        dataset = _map_with_actors(dataset, FusedWorker, setup, layout.workers, layout.cpus)
    for block in _stream(dataset):
        for text in block["report"].to_pylist():
            yield ShardReport.from_json(text)


def _fit_projection(rows: pa.Table, layout: Layout, setup: WorkerSetup, store: Store) -> None:
    """Fit the store's PCA on patches of a sample of the images."""
    from dino_ops.pca import fit_pca

    count = projection.images_to_fit(setup.config, len(rows))
    sample = rows.take(pa.array(np.linspace(0, len(rows) - 1, count).astype(np.int64)))
    dataset = _dataset(sample, max(1, min(FEWEST_IMAGES, count // layout.workers)), report_each=False)
    dataset = _map_with_actors(dataset, SampleWorker, setup, layout.workers, layout.cpus, layout.gpus)
    parts = [unpack(block) for block in _stream(dataset)]
    config = setup.config
    dimensions = config.store.pca
    assert dimensions is not None
    fitted = {}
    for column in descriptor_columns(config):
        found = [part[column] for part in parts if column in part]
        vectors = np.concatenate(found) if found else np.zeros((0, 0), np.float32)
        if len(vectors) < dimensions:
            raise JobError(
                f"store.pca={dimensions} needs at least as many patches, but the sample of {count} images gave "
                f"{len(vectors)}: give a smaller store.pca, or more readable images."
            )
        fitted[column] = fit_pca(vectors, dimensions, seed=0)
    projection.write_projections(store.uri, config, fitted)


class SampleWorker:
    """Descriptors of a few patches of each image, for fitting the PCA."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self.extractor = make_extractor(setup)

    def __call__(self, block: pa.Table) -> pa.Table:
        decoded = fetch_and_decode(block, self.setup, self.extractor.patch_size)
        features = extract_each(self.extractor, decoded, self.setup.run_id) if decoded.prepared else []
        per_image = max(1, projection.SAMPLE_PATCHES // projection.SAMPLE_IMAGES)
        picked: dict[str, list[np.ndarray]] = {}
        for source, one in zip(decoded.sources, features, strict=True):
            for column in descriptor_columns(self.setup.config):
                vectors = descriptor_map(one, column)
                vectors = vectors.reshape(-1, vectors.shape[-1])
                chosen = np.random.default_rng(source["position"]).permutation(len(vectors))[:per_image]
                picked.setdefault(column, []).append(vectors[chosen])
        return pack({column: np.concatenate(vectors) for column, vectors in picked.items()})


def _dataset(rows: pa.Table, block_size: int, report_each: bool) -> Any:
    """Listing rows in blocks. `report_each`: what a worker yields arrives at once, not when its block is done."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # blocks whose task failed are dropped; the caller knows what is undone
    context.target_max_block_size = 1 if report_each else None
    context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS

    # `take` copies, so that a block does not carry the whole table's buffers with it
    starts = range(0, len(rows), block_size)
    blocks = [rows.take(pa.array(range(at, min(at + block_size, len(rows))), pa.int64())) for at in starts]
    return ray.data.from_arrow(blocks)


def _map_with_actors(
    dataset: Any,
    worker: type,
    setup: WorkerSetup,
    count: int | tuple[int, int],
    cpus: float,
    gpus: float = 0.0,
    threads: int = 1,
) -> Any:
    """Map blocks with a pool of `worker` actors, of fixed or (least, most) size; each has `threads` blocks at once.

    No block waits at an actor for another one: it would be lost with it. A dead worker is replaced, but Ray does not
    run its block again: it would do so for ever, and the replay of a half-read generator could lose or repeat
    reports. The caller sees which images are undone.
    """
    from ray.data import ActorPoolStrategy

    least, most = (count, count) if isinstance(count, int) else count
    with _without_deprecation_warning():
        return dataset.map_batches(
            worker,
            fn_constructor_kwargs={"setup": setup},
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_tasks_in_flight_per_actor=threads,
                enable_true_multi_threading=threads > 1,
            ),
            max_concurrency=threads,
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=0,
        )


@contextlib.contextmanager
def _without_deprecation_warning() -> Iterator[None]:
    """Ray's limits on retries have no other way in until Ray 2.64, which pyproject.toml therefore excludes."""
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


def _stream(dataset: Any) -> Iterator[pa.Table]:
    """The blocks of a dataset as they are made. Raises what `explain_ray_error` makes of Ray's errors.

    Close it while Ray is there: Ray Data that is told later to stop starts another Ray to do so, and hangs.
    """
    from ray.exceptions import RayError

    others = set(threading.enumerate())
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except RayError as error:
        raise explain_ray_error(error, "the extraction") from None
    finally:
        # Its threads live a moment longer than the iterator, and a reference that one of them drops when Ray has gone
        # ends this process without a word.
        for thread in set(threading.enumerate()) - others:
            if thread.name == READING_THREADS:
                thread.join(READING_THREADS_SECONDS)
