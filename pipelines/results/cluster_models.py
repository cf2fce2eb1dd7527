"""The centroids of clusters/NAME in full precision, as a training leaves and continues them.

    model/checkpoint.npz    of a training that has not ended: centroids after its last iterations
    model/RUN_ID.npz        of a training that has ended; files of both tables carry the RUN_ID of the run that ended it

The tables are what users read; these files are what a job computes with.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.errors import JobError
from pipelines.storage.errors import said
from pipelines.store.arrays import npz_arrays, npz_bytes
from pipelines.store.checksums import checksum_of
from pipelines.store.parquet import DamagedFile

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Level:
    """Centroids of one level of a tree.

    centroids: (k, D) float64. offsets: (parents + 1,) int64, which centroids divide each cluster of the level above;
    None for the first level.
    """

    centroids: np.ndarray
    offsets: np.ndarray | None = None


@dataclass
class Progress:
    """How far a training is, and what it trains on.

    run_id: of the run that ended it, or began it until then. settings: those that decide which clusters come out.
    images: a digest of the images. ks: clusters of each level, as asked for or chosen. level: the one that is being
    trained. iteration: the last finished one of that level. objectives: mean inertia a vector, after every iteration of
    every level. vectors: how many the images have. trained_on: how many of them the centroids are fitted to.
    mean_distance: of all vectors to their centroids, at the end of the training.
    """

    run_id: str
    settings: dict[str, Any]
    images: str
    ks: list[int] = field(default_factory=list)
    level: int = 0
    iteration: int = 0
    trained: bool = False
    converged: bool = False
    objectives: list[float] = field(default_factory=list)
    vectors: int = 0
    trained_on: int = 0
    mean_distance: float | None = None
    messages: list[str] = field(default_factory=list)


@dataclass
class Model:
    """What a training made, or has made so far. The clusters of the last of the levels are those of the tables."""

    progress: Progress
    levels: list[Level]

    @property
    def k(self) -> int:
        return len(self.levels[-1].centroids)

    @property
    def dimension(self) -> int:
        return self.levels[-1].centroids.shape[1]


def checkpoint_uri(clusters: str) -> str:
    return storage.join(clusters, "model", "checkpoint.npz")


def model_uri(clusters: str, run_id: str) -> str:
    return storage.join(clusters, "model", f"{run_id}.npz")


def write_model(uri: str, model: Model, options: storage.Options) -> str:
    """Write a model whole. Returns the checksum of its file."""
    arrays: dict[str, Any] = {f"centroids{at}": level.centroids for at, level in enumerate(model.levels)}
    arrays |= {f"offsets{at}": level.offsets for at, level in enumerate(model.levels) if level.offsets is not None}
    about = {"schema_version": SCHEMA_VERSION, "levels": len(model.levels), **asdict(model.progress)}
    data = npz_bytes(arrays | {"about": np.array(json.dumps(about))})
    storage.write_bytes(uri, data, options)
    return checksum_of(data)


def read_model(uri: str, options: storage.Options, checksum: str | None = None) -> Model | None:
    """The model at `uri`, or None when there is none. checksum: what it must have, where that is known.

    Raises JobError for one that is damaged.
    """
    fs, path = storage.filesystem(uri, options)
    try:
        data = fs.cat_file(path)
    except FileNotFoundError:
        return None
    if checksum is not None and checksum_of(data) != checksum:
        raise DamagedFile(uri, "its bytes are not those that were written")
    try:
        arrays = npz_arrays(uri, data)
        about = json.loads(str(arrays["about"]))
        count, version = about.pop("levels"), about.pop("schema_version")
        if version > SCHEMA_VERSION:
            raise JobError(f"{uri} was written by a newer dinoray: update dinoray.")
        levels = [Level(arrays[f"centroids{at}"], arrays.get(f"offsets{at}")) for at in range(count)]
        return Model(Progress(**about), levels)
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedFile(uri, said(error)) from None
