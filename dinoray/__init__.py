"""dinoray from Python: features of images in memory, and every command as a function.

    import dinoray

    dinoray.Extractor("dinov2_vits14")("photo.jpg").descriptor    # (grid height, grid width, channels) float32
    dinoray.extract("photos", "features", settings={"features.stride": 8})
    dinoray.cluster("features", "words", k=100)

A function has the name and the arguments of its command (`dinoray cluster --help`), besides `settings`, a mapping of
section.key to value, and `config`, YAML files. It returns the job's result, whose fields are those that --json prints,
and raises an error where the command would print a sentence: RequestError or ModelError (exit code 2), JobError (1), or
KeyboardInterrupt (130).

Importing dinoray loads neither torch nor Ray: a name is resolved when it is first used. The signatures are in
__init__.pyi.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from pipelines.jobs import JOBS
from pipelines.settings.calls import function_of

__version__ = metadata.version("dinoray")

_RE_EXPORTED = {
    "Extractor": "dino_ops.extractor",
    "ImageFeatures": "dino_ops.extractor",
    "ImageError": "dino_ops.errors",
    "ModelError": "dino_ops.errors",
    "DinorayError": "pipelines.errors",
    "InputError": "pipelines.errors",
    "JobError": "pipelines.errors",
    "RequestError": "pipelines.errors",
    "StorageError": "pipelines.errors",
}
_JOBS = {command.replace(" ", "_"): job for command, job in JOBS.items()}

__all__ = sorted([*_RE_EXPORTED, *_JOBS, "run"])


def __getattr__(name: str) -> Any:
    if name in _RE_EXPORTED:
        found = getattr(importlib.import_module(_RE_EXPORTED[name]), name)
    elif name in _JOBS:
        found = function_of(_JOBS[name])
    elif name == "run":
        found = importlib.import_module("pipelines.pipeline.job").run_file
    else:
        raise AttributeError(f"module 'dinoray' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
