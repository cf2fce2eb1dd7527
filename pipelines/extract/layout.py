"""Laying out an extraction on a Ray cluster, and streaming the workers' reports back to the driver."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipelines.errors import RequestError
from pipelines.features.extractor import WorkerSetup, make_extractor
from pipelines.settings.sections import Config
from pipelines.store import weights
from pipelines.store.schemas import descriptor_columns
from pipelines.store.vectors import BYTES_PER_VALUE

SHARD_BYTES = 256 * 2**20  # of stored descriptors: in the middle of the 128-512 MB aimed at on big runs
BLOCKS_PER_WORKER = 4  # so that workers finish together
WRITER_SHARE = 0.5  # of a decoding task's CPUs: compressing releases the CPU while it waits for the disk
FEWEST_IMAGES = 32  # a block below this is not worth a file, while every worker has one
CPUS_OF_A_WORKER = 4.0
WORKER_START_SECONDS = 4.0  # of a CPU: importing torch, reading weights
GFLOP_A_CPU_SECOND = 50.0  # float32, one core


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
