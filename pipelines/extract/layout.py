"""How an extraction is spread over a cluster: which workers, and how many images in a block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.errors import RequestError
from pipelines.features.extractor import ExtractorSetup, make_extractor
from pipelines.running.layout import Layout, device_of, plan_workers
from pipelines.settings.sections import Config
from pipelines.store import weights
from pipelines.store.schemas import descriptor_columns
from pipelines.store.vectors import BYTES_PER_VALUE

# In the middle of the 128 to 512 MB that files of big runs should have.
SHARD_DESCRIPTOR_BYTES = 256 * 2**20
# Several blocks each, so that workers finish together.
BLOCKS_PER_WORKER = 4
# Compressing releases the CPU while it waits for the disk.
WRITER_SHARE_OF_DECODING_CPUS = 0.5
# Fewer are not worth a file, provided that every worker has a block.
FEWEST_IMAGES_PER_BLOCK = 32
MOST_CPUS_PER_WORKER = 4.0
WORKER_START_CPU_SECONDS = 4.0
FLOAT32_GFLOP_PER_CPU_SECOND = 50.0


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model.

    dims: descriptor column -> values a patch, before PCA. patches: of a typical image. width: channels of a token.
    """

    patch_size: int
    dims: dict[str, int]
    patches: int
    depth: int
    width: int

    @property
    def gflop(self) -> float:
        """GFLOP of a whole forward pass of a typical image."""
        return self.gflop_of(self.patches)

    def gflop_of(self, patches: float) -> float:
        """GFLOP of an image with so many patches.

        A block multiplies 12 width^2 weights (qkv 3, projection 1, MLP 8) with every token, and tokens with tokens
        twice.
        """
        return self.depth * (24 * patches * self.width**2 + 4 * patches**2 * self.width) / 1e9


@dataclass(frozen=True)
class ExtractionLayout(Layout):
    """How an extraction is spread.

    block_size: images. separate: decoding and writing run apart from the model, and decode_cpus is what each decoding
    task takes.
    """

    block_size: int
    separate: bool
    decode_cpus: float
    facts: ModelFacts


def model_facts(config: Config) -> ModelFacts:
    """Build the model on the CPU and say what planning needs. Raises ModelError for anything that does not fit."""
    on_cpu = config.model.model_copy(update={"precision": "auto", "compile": False})
    config = config.model_copy(update={"model": on_cpu})
    extractor = make_extractor(ExtractorSetup("", "", config, "cpu", weights.identity(config), threads=0))
    dims = dict.fromkeys(descriptor_columns(config), extractor.embed_dim)
    for column, dim in dims.items():
        if config.store.pca is not None and config.store.pca > dim:
            raise RequestError(f"store.pca is {config.store.pca}, but {column} has only {dim} dimensions: give fewer.")
    height, width = config.image.size or (side := config.image.shorter_side or 512, side * 4 // 3)
    grid_height, grid_width = extractor.grid(height, width)
    patches = grid_height * grid_width
    return ModelFacts(extractor.patch_size, dims, patches, extractor.depth, extractor.embed_dim)


def plan_extraction(resources: Mapping[str, float], config: Config, facts: ModelFacts, images: int) -> ExtractionLayout:
    """Workers and block size for a cluster with `resources` ({"CPU": ..., "GPU": ...}).

    Raises RequestError when the cluster does not have what was asked for.
    """
    run = config.run
    on_gpu = device_of(resources, config) == "cuda"
    separate = on_gpu if run.stages == "auto" else run.stages == "separate"
    total_cpus = resources.get("CPU", 1.0)
    # Ray waits forever when the models' actors leave no CPU to the stages before and after them.
    decode_cpus = min(1.0, total_cpus / 4) if separate else 0.0
    reserved_cpus = decode_cpus * (1 + WRITER_SHARE_OF_DECODING_CPUS)
    left = total_cpus - reserved_cpus
    layout = plan_workers(
        resources,
        config,
        usual_cpus=1.0 if on_gpu else _usual_cpus(left),
        most_cpus=1.0 if on_gpu else left if run.workers else MOST_CPUS_PER_WORKER,
        reserved_cpus=reserved_cpus,
        most_workers=None if on_gpu else _workers_worth_starting(images, facts),
    )
    block_size = run.images_per_shard or _block_size(config, facts, images, layout.workers)
    workers = min(layout.workers, math.ceil(images / block_size))
    return ExtractionLayout(layout.device, workers, layout.cpus, layout.gpus, block_size, separate, decode_cpus, facts)


def _usual_cpus(cpus: float) -> float:
    """One CPU each scales best, but every worker holds a model: on larger machines four CPUs share one."""
    return min(1.0, cpus) if cpus <= MOST_CPUS_PER_WORKER else MOST_CPUS_PER_WORKER


def _workers_worth_starting(images: int, facts: ModelFacts) -> int:
    """A handful of small images is done before a second worker has loaded its libraries."""
    return max(1, math.ceil(images * facts.gflop / FLOAT32_GFLOP_PER_CPU_SECOND / WORKER_START_CPU_SECONDS))


def _block_size(config: Config, facts: ModelFacts, images: int, workers: int) -> int:
    values = sum(min(dim, config.store.pca or dim) for dim in facts.dims.values()) * facts.patches / config.store.every
    largest = max(1, int(SHARD_DESCRIPTOR_BYTES / (values * BYTES_PER_VALUE[config.store.dtype])))
    fair = math.ceil(images / (workers * BLOCKS_PER_WORKER))
    smallest = min(FEWEST_IMAGES_PER_BLOCK, math.ceil(images / workers))
    return max(1, min(largest, max(fair, smallest)))
