"""The centroids of clusters/NAME in full precision, as a training leaves and continues them.

    model/checkpoint.npz    a training that has not ended: centroids after its last iterations
    model/RUN_ID.npz        a training that has; files of both tables carry its RUN_ID in their names

The tables are what users read; these files are what a job computes with.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.errors import JobError

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
    """How far a training is, and what it is of."""

    run_id: str
    settings: dict[str, Any]  # that decide which clusters come out
    images: str  # digest of the images that it is of
    ks: list[int] = field(default_factory=list)  # clusters of each level, as asked for or chosen
    level: int = 0  # that is being trained
    iteration: int = 0  # of that level, finished
    trained: bool = False
    converged: bool = False
    objectives: list[float] = field(default_factory=list)  # mean inertia a vector, after every iteration of every level
    vectors: int = 0  # of the images
    trained_on: int = 0  # vectors
    mean_distance: float | None = None  # of all vectors to their centroids, when it was trained
    messages: list[str] = field(default_factory=list)


@dataclass
class Model:
    """levels: the last one's clusters are those of the tables."""

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


def write_model(uri: str, model: Model, options: storage.Options) -> int:
    """Write a model whole; its size in bytes."""
    arrays: dict[str, Any] = {f"centroids{at}": level.centroids for at, level in enumerate(model.levels)}
    arrays |= {f"offsets{at}": level.offsets for at, level in enumerate(model.levels) if level.offsets is not None}
    about = {"schema_version": SCHEMA_VERSION, "levels": len(model.levels), **asdict(model.progress)}
    content = io.BytesIO()
    np.savez(content, about=np.array(json.dumps(about)), **arrays)
    data = content.getvalue()
    storage.write_bytes(uri, data, options)
    return len(data)


def read_model(uri: str, options: storage.Options) -> Model | None:
    """The model at `uri`, or None when there is none. Raises JobError for one that is damaged."""
    fs, path = storage.filesystem(uri, options)
    try:
        data = fs.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            count, version = about.pop("levels"), about.pop("schema_version")
            if version > SCHEMA_VERSION:
                raise JobError(f"{uri} was written by a newer dinoray: update dinoray.")
            levels = [Level(arrays[f"centroids{at}"], arrays.get(f"offsets{at}")) for at in range(count)]
            return Model(Progress(**about), levels)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError):
        raise JobError(f"{uri} is damaged: remove it and run the same command again, which trains anew.") from None
