"""Every job of a small store with everything in it, as its command runs it, without Ray and a model: to be killed,
paused and raced at every step of theirs.

The store was extracted in three runs; clusters, parts, matches and an index were made before the third, so that each
job has something to do: images that are new, changed and gone, files to merge, results that are behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from ray_in_process import ray_replaced
from small_runs import settings
from without_ray import model_left_out

from pipelines import cluster, correspond, cosegment, extract, index
from pipelines.cluster import training
from pipelines.pipeline import job as pipeline_job
from pipelines.settings.pipeline_file import read_pipeline
from pipelines.settings.sections import Config
from pipelines.upkeep import compact

PATCH_PIXELS = 8
GRID = (2, 3)
# Far from each other in direction, so that k-means finds the same clusters in whatever order it sees patches.
COLOURS = ((230, 40, 40), (20, 150, 20), (10, 10, 90))
INPUTS: dict[str, dict[str, int]] = {
    "first": {"x/a": 1, "x/b": 1, "y/c": 1},
    "second": {"y/d": 1},
    "third": {"x/b": 2, "y/e": 1},
    "new": {"x/f": 1, "y/g": 1},
    "changed": {"x/a": 2, "y/c": 2},
    "all but one": {"x/a": 1, "x/b": 2, "y/c": 1, "y/e": 1},
    "all but one, and new": {"x/a": 1, "x/b": 2, "y/c": 1, "y/e": 1, "x/f": 1, "y/g": 1},
    "all but one, and changed": {"x/a": 2, "x/b": 2, "y/c": 2, "y/e": 1},
    "all but one, and new, and changed": {"x/a": 2, "x/b": 2, "y/c": 2, "y/e": 1, "x/f": 1, "y/g": 1},
}
"""folder -> image -> version"""
BROKEN = {
    "second": "x/broken",
    "new": "y/broken",
    "all but one, and new": "y/broken",
    "all but one, and new, and changed": "y/broken",
}
SETTINGS = (
    "image.shorter_side=16",
    "run.max_failed_fraction=1",
    "cluster.k=3",
    "cosegment.sets=directory",
    "cosegment.refine=false",
    "cosegment.num_parts=2",
    "cosegment.sample_interval=1",
    "correspond.pairs=knn:2",
    "correspond.num_pairs=3",
)


@dataclass(frozen=True)
class Place:
    """A store, the folder of the INPUTS, and the options of the store's storage."""

    store: str
    inputs: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, *overrides: str) -> Config:
        made = settings(*SETTINGS, *overrides)
        return made.model_copy(
            update={"storage": made.storage.model_copy(update={"options": self.options})} if self.options else {}
        )


def extract_from(folder: str, **arguments: Any) -> Callable[[Place], Any]:
    """An extraction of one of the INPUTS."""
    return lambda place: extract.run(
        place.config(), input=os.path.join(place.inputs, folder), store=place.store, **arguments
    )


def _cluster(name: str = "words", **arguments: Any) -> Callable[[Place], Any]:
    return lambda place: cluster.run(place.config(), store=place.store, name=name, **arguments)


def _index(name: str) -> Callable[[Place], Any]:
    return lambda place: index.run(place.config(), store=place.store, name=name)


def _cosegment(name: str) -> Callable[[Place], Any]:
    return lambda place: cosegment.run(place.config(), store=place.store, name=name)


def _correspond(name: str) -> Callable[[Place], Any]:
    return lambda place: correspond.run(place.config(), store=place.store, name=name)


def _compact(place: Place) -> Any:
    return compact.run(place.config("compact.retention_hours=0"), store=place.store)


def _run(place: Place) -> Any:
    """A schedule of three jobs, as a pipeline file asks for them."""
    file = Path(place.inputs) / "pipeline.yaml"
    made = read_pipeline(file, place.config().model_dump(exclude_unset=True))
    made = type(made)(place.store, made.jobs, made.config)
    return pipeline_job.run(made)


JOBS: dict[str, Callable[[Place], Any]] = {
    "extract new": extract_from("new"),
    "extract changed": extract_from("changed"),
    "prune": extract_from("all but one", prune=True),
    "cluster": _cluster(),
    "cluster --update": _cluster(update=True),
    "cosegment": _cosegment("things"),
    "correspond": _correspond("near"),
    "index build": _index("fresh"),
    "index update": _index("images"),
    "compact": _compact,
    "run": _run,
    "first cluster": _cluster("first"),
    "first cosegment": _cosegment("first"),
    "first correspond": _correspond("first"),
}
"""Those called `first` make a result that was not there, and with it its tables, as `index build` does."""


def prune_as_planned(*, new: bool, changed: bool) -> str:
    """What is left of `prune` where others extracted images after it was planned: those are neither gone nor to be
    extracted again."""
    return "all but one" + ", and new" * new + ", and changed" * changed


PRUNES_AS_PLANNED = {
    name: extract_from(name, prune=True)
    for name in (
        prune_as_planned(new=True, changed=False),
        prune_as_planned(new=False, changed=True),
        prune_as_planned(new=True, changed=True),
    )
}

OTHERS = tuple(name for name in JOBS if not name.startswith("first"))
"""What runs beside them, besides each itself."""
PARTS_OF_RUN = ("extract new", "cluster --update", "index update")


@contextmanager
def jobs_in_process() -> Iterator[None]:
    """Within: jobs run in this process, without Ray and a model, and lose no time on what touches no storage."""
    with (
        ray_replaced(),
        model_left_out(),
        mock.patch.multiple(training, STARTS_OF_FEW_CLUSTERS=1, ITERATIONS_ON_SAMPLE=2),
    ):
        yield


def make_inputs(folder: Path) -> Path:
    """Images of 2 x 3 patches, each of one colour and a little noise; the same version has the same bytes and time."""
    for name, images in INPUTS.items():
        for image_id, version in images.items():
            path = folder / name / f"{image_id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _image(image_id, version).save(path)
            os.utime(path, (version, version))
        if name in BROKEN:
            path = folder / name / f"{BROKEN[name]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"no image")
            os.utime(path, (1, 1))
    jobs = [{"extract": {"input": str(folder / "new")}}, {"cluster": {"name": "words", "update": True}}]
    (folder / "pipeline.yaml").write_text(json.dumps({"store": "-", "jobs": [*jobs, {"index": {"name": "images"}}]}))
    return folder


def _image(image_id: str, version: int) -> Image.Image:
    generator = np.random.default_rng([*image_id.encode(), version])
    colours = np.array(COLOURS)[generator.integers(0, len(COLOURS), GRID)]
    # every image has each
    colours.reshape(-1, 3)[: len(COLOURS)] = COLOURS
    pixels = colours.repeat(PATCH_PIXELS, 0).repeat(PATCH_PIXELS, 1) + generator.integers(-8, 8, 3)
    noise = generator.integers(-4, 5, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def make_store(place: Place) -> None:
    """The store that every trial begins with."""
    extract_from("first")(place)
    extract_from("second")(place)
    for name in ("cluster", "cosegment", "correspond", "index update"):
        JOBS[name](place)
    extract_from("third")(place)
