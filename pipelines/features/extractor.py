"""The extractor that a store's spec describes, on a worker or in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.running.cpus import available_cpus
from pipelines.settings.sections import Config
from pipelines.store.weights import RANDOM_SEED, checked


@dataclass(frozen=True)
class ExtractorSetup:
    """All that a worker needs to know; small, since it travels with the actor.

    weights: their identity in the store's spec.
    """

    store: str
    run_id: str
    config: Config
    device: str
    weights: str
    threads: int
    progress_seconds: float = 1.0


def make_extractor(setup: ExtractorSetup) -> Any:
    """The Extractor of a configuration, on the device promised to this worker.

    Raises ModelError when the device is not there, or weights and model do not fit; JobError for other weights than
    the store's.
    """
    import torch

    from dino_ops.extractor import Extractor

    if setup.threads:
        torch.set_num_threads(min(setup.threads, available_cpus()))
    config = setup.config
    return Extractor(
        config.model.name,
        checked(config, setup.weights),
        layer=config.features.layer,
        facet=config.features.facet,
        extra=[(item.layer, item.facet) for item in config.features.extra],
        stride=config.features.stride,
        final_norm=config.features.final_norm,
        position=config.features.position,
        saliency_heads=config.features.saliency_heads,
        channel_order=config.features.channel_order,
        descriptors=config.store.patches != "none",
        saliency=config.features.saliency,
        embedding=config.features.embedding,
        shorter_side=config.image.shorter_side,
        size=config.image.size,
        native=config.image.native,
        resample=config.image.resample,
        crop=config.image.crop,
        max_pixels=config.image.max_pixels,
        mean=config.image.mean,
        std=config.image.std,
        device=setup.device,
        precision=config.model.precision,
        compile=config.model.compile,
        batch_size=config.run.batch_size,
        seed=RANDOM_SEED,
    )
