"""What a training consists of: everything that its workers need to know, and that a checkpoint must agree with."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dino_ops.multicrop import MultiCrop
from dino_ops.recipe import Recipe
from pipelines import storage
from pipelines.errors import RequestError, counted
from pipelines.settings.sections import Config, TrainSettings
from pipelines.store import weights
from pipelines.store.weights import RANDOM_SEED

IMAGES_DIGEST_KEY = "images"


@dataclass(frozen=True)
class TrainSetup:
    """A training, the same for all of its workers.

    output: URI. weights: where it starts, `random` or as model.weights says; weights_identity: see
    `pipelines.store.weights.identity`. images: in INPUT. steps_per_epoch: whole batches.
    """

    config: Config
    output: str
    weights: str
    weights_identity: str
    recipe: Recipe
    images: int
    images_digest: str
    steps_per_epoch: int
    run_id: str

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.recipe.epochs

    def agreement(self) -> dict[str, Any]:
        """What a checkpoint must have been made with so that continuing from it is the same training."""
        recipe = dataclasses.asdict(self.recipe)
        crops = recipe.pop("multicrop")
        return {
            "model.name": self.config.model.name,
            "model.weights": self.weights_identity,
            "image.mean": list(self.config.image.mean) if self.config.image.mean else None,
            "image.std": list(self.config.image.std) if self.config.image.std else None,
            **{f"train.{key}": value for key, value in recipe.items()},
            **{f"train.{key}": list(value) if isinstance(value, tuple) else value for key, value in crops.items()},
            IMAGES_DIGEST_KEY: self.images_digest,
        }


def make_setup(config: Config, output: str, images: pa.Table, run_id: str) -> TrainSetup:
    """Raises RequestError where the images or the settings do not allow a training."""
    asked = config.train
    if len(images) < asked.batch_size:
        raise RequestError(
            f"INPUT has {counted(len(images), 'image')}, fewer than the {asked.batch_size} of one step: give more "
            f"images, or train.batch_size of at most {len(images)}."
        )
    if config.model.compile:
        raise RequestError("model.compile=true is for extract; train runs the model as it is: leave it out.")
    start = _start(config)
    return TrainSetup(
        config=start,
        output=output,
        weights=start.model.weights,
        weights_identity=weights.identity(start),
        recipe=make_recipe(asked),
        images=len(images),
        images_digest=digest(images),
        steps_per_epoch=len(images) // asked.batch_size,
        run_id=run_id,
    )


def _start(config: Config) -> Config:
    """The settings with model.weights as every worker understands it: `random` unless it was given, files absolute."""
    given = config.model.weights if "weights" in config.model.model_fields_set else "random"
    start = given if given in weights.NAMED_WEIGHTS else storage.normalise(given)
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": start})})


def make_recipe(asked: TrainSettings) -> Recipe:
    """The settings as the library takes them."""
    values = asked.model_dump()
    crops = {field.name for field in dataclasses.fields(MultiCrop)} & values.keys()
    steps = {field.name for field in dataclasses.fields(Recipe)} & values.keys()
    multicrop = MultiCrop(**{name: values[name] for name in crops})
    return Recipe(**{name: values[name] for name in steps}, multicrop=multicrop)


def digest(images: pa.Table) -> str:
    """A hash of the images of INPUT: their ids and versions, in order."""
    content = hashlib.sha256()
    for name in ("image_id", "source_version"):
        for chunk in images[name].chunks:
            for value in chunk.to_pylist():
                content.update(f"{value}\n".encode(errors="surrogatepass"))
    return content.hexdigest()[:16]


def model_seed(setup: TrainSetup) -> int:
    """The seed of the first weights: the training's, unless the weights were named as a store names them."""
    return setup.recipe.seed if setup.weights == "random" else RANDOM_SEED
