"""checkpoints/step-XXXXXXXX.pt below OUTPUT: all that a training needs to continue as if it had not been stopped.

A checkpoint is written whole or not at all. Its layout is that of DINO's own checkpoints, so that other tools, and
`extract`, can load the teacher from it.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
import zlib
from typing import Any

import torch

from pipelines import storage
from pipelines.errors import JobError
from pipelines.store.checksums import UNREADABLE_ZIP, check_zip

SCHEMA_VERSION = 1
# What readers of zip files, of pickles and of their content raise where bytes are others than were written.
UNREADABLE = (
    *UNREADABLE_ZIP,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    ValueError,
)
_NAME = re.compile(r"step-(\d{8})\.pt")


def checkpoint_uri(output: str, step: int) -> str:
    return storage.join(output, "checkpoints", f"step-{step:08}.pt")


def write_checkpoint(
    output: str, state: dict[str, Any], step: int, agreement: dict[str, Any], options: storage.Options
) -> None:
    """Write the state after `step` steps. Raises OSError, or JobError for a storage out of reach."""
    content = io.BytesIO()
    about = {"schema_version": SCHEMA_VERSION, "step": step, "agreement": agreement}
    torch.save({**state, "dinoray": about}, content)
    storage.write_bytes(checkpoint_uri(output, step), content.getvalue(), options)


def list_checkpoints(output: str, options: storage.Options) -> list[int]:
    """Steps of the checkpoints there are, in order."""
    fs, path = storage.filesystem(storage.join(output, "checkpoints"), options)
    try:
        with storage.reaching(output):
            names = [name.rsplit("/", 1)[-1] for name in fs.ls(path, detail=False)]
    except FileNotFoundError:
        return []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def read_checkpoint(output: str, step: int, options: storage.Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, agreement). Nothing in the file is executed. Raises JobError for one that is damaged."""
    uri = checkpoint_uri(output, step)
    fs, path = storage.filesystem(uri, options)
    with storage.reaching(uri):
        data = fs.cat_file(path)
    try:
        check_zip(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        about = state.pop("dinoray")
        version, agreement = about["schema_version"], about["agreement"]
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ):
        raise JobError(
            f"The checkpoint {uri} is damaged: remove it, and the same command continues from the one before."
        ) from None
    if version > SCHEMA_VERSION:
        raise JobError(f"{uri} was written by a newer dinoray: update dinoray.")
    return state, agreement


def remove_old(output: str, keep: int, options: storage.Options) -> None:
    """Leave the latest `keep` checkpoints."""
    for step in list_checkpoints(output, options)[:-keep]:
        fs, path = storage.filesystem(checkpoint_uri(output, step), options)
        with storage.reaching(output):
            fs.rm_file(path)
