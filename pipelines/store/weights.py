"""Weights files wherever they lie: their identity in the spec, and a copy that a worker can open.

A remote file is downloaded once to a machine. The copy is named after the file's URI, size and version, so that one
that was overwritten is downloaded again; what counts in the end is the hash of its content.
"""

from __future__ import annotations

import hashlib
import os

from dino_ops.packaged import PACKAGED, packaged_weights
from pipelines import storage
from pipelines.errors import JobError, RequestError
from pipelines.settings.sections import Config
from pipelines.storage.filesystems import version_of

RANDOM_SEED = 0
NAMED_WEIGHTS = ("pretrained", "random")


def identity(config: Config) -> str:
    """What the spec says of `model.weights`: `pretrained`, `random:SEED`, or `sha256:...` of the file's content.

    Weights that come with dinoray count by content too: another version may carry better ones under the same name.

    Raises RequestError for a file that does not exist or cannot be read, ModelError for packaged weights that are
    missing.
    """
    if config.model.weights == "random":
        return f"random:{RANDOM_SEED}"
    if config.model.weights in NAMED_WEIGHTS and not is_packaged(config):
        return config.model.weights
    return f"sha256:{storage.sha256(local_file(config))}"


def is_packaged(config: Config) -> bool:
    """Whether the weights asked for are in a file of the installation."""
    return config.model.weights == "pretrained" and config.model.name in PACKAGED


def local_file(config: Config) -> str:
    """The weights file on this machine, downloaded if it lies elsewhere. Raises as `identity` does."""
    if is_packaged(config):
        return str(packaged_weights(config.model.name))
    weights = config.model.weights
    uri = storage.normalise(weights)
    try:
        return _local_copy(uri, config)
    except (FileNotFoundError, IsADirectoryError):
        raise RequestError(
            f"The weights file {weights} does not exist: give model.weights a .pth, .pt or .safetensors file, "
            "`pretrained` or `random`."
        ) from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RequestError(f"The weights {weights} cannot be read: {reason}.") from None


def checked(config: Config, expected: str) -> str:
    """`model.weights` as something this worker can open, with the content that the store's spec names.

    Raises JobError when this machine sees another file than the driver did.
    """
    packaged = is_packaged(config)
    if config.model.weights in NAMED_WEIGHTS and not packaged:
        return config.model.weights
    path = local_file(config)
    if (found := f"sha256:{storage.sha256(path)}") != expected:
        weights = f"of {config.model.name} that come with dinoray" if packaged else config.model.weights
        same = "install the same dinoray on every machine" if packaged else "give the same file to every machine"
        raise JobError(
            f"The weights {weights} on this worker ({found[:15]}...) differ from those of the store "
            f"({expected[:15]}...): {same}, and run the same command again."
        )
    return path


def _local_copy(uri: str, config: Config) -> str:
    fs, path = storage.filesystem(uri, config.storage.options)
    info = fs.info(path)
    if info["type"] != "file":
        raise IsADirectoryError(path)
    if storage.is_local(uri):
        return uri
    key = hashlib.sha256(f"{uri} {info.get('size')} {version_of(info)}".encode()).hexdigest()[:16]
    folder = os.path.join(os.path.expanduser("~"), ".cache", "dinoray", "weights")
    target = os.path.join(folder, f"{key}-{uri.rsplit('/', 1)[1]}")
    if not os.path.exists(target):
        os.makedirs(folder, exist_ok=True)
        partial = storage.partial_name(target)
        fs.get_file(path, partial)
        # whole or absent, also when two workers download at once
        os.replace(partial, target)
    return target
