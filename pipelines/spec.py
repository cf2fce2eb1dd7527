"""The extraction spec: what decides the values in a store, and nothing else.

A store has one spec for life. It is written to store.json with its fingerprint and compared on every run; weights
count by their content, so that moving a file changes nothing and overwriting one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from pipelines import storage
from pipelines.config import Config
from pipelines.errors import RequestError
from pipelines.storage import Options

SECTIONS = ("model", "image", "features", "store")
RANDOM_SEED = 0

# Decided by the machine at hand, not by the spec: they move values by less than half precision keeps.
_NOT_IDENTITY = {"model": {"device", "compile"}}


def make_spec(config: Config) -> dict[str, Any]:
    """The spec of a configuration as plain JSON data. Raises RequestError for weights that do not exist."""
    settings = config.model_dump(mode="json", include=set(SECTIONS))
    for section, keys in _NOT_IDENTITY.items():
        for key in keys:
            del settings[section][key]
    settings["model"]["weights"] = weights_identity(config)
    settings["features"]["rope"] = "before"  # query and key facets are taken before rotary positions are applied
    return settings


def weights_identity(config: Config) -> str:
    """`pretrained`, `random:SEED`, or `sha256:...` of the weights file."""
    weights = config.model.weights
    if weights == "pretrained":
        return weights
    if weights == "random":
        return f"random:{RANDOM_SEED}"
    uri = storage.normalise(weights)
    try:
        return f"sha256:{storage.sha256(uri, config.storage.options)}"
    except FileNotFoundError:
        raise RequestError(
            f"The weights file {weights} does not exist: give model.weights a .pth, .pt or .safetensors file, "
            "`pretrained` or `random`."
        ) from None
    except OSError as error:
        raise RequestError(f"The weights {weights} cannot be read: {os.strerror(error.errno or 5)}.") from None


def fingerprint(spec: dict[str, Any]) -> str:
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """`section.key: stored X, asked Y` for every setting in which two specs differ."""
    lines = []
    for section in sorted({*stored, *asked}):
        old, new = stored.get(section, {}), asked.get(section, {})
        lines += [
            f"{section}.{key}: the store has {_show(old.get(key))}, asked was {_show(new.get(key))}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
    return lines


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:28]}...{text[-6:]}"


def local_weights(config: Config, directory: str, options: Options | None = None) -> str:
    """`model.weights` as something a worker can open: remote files are copied into `directory` once."""
    weights = config.model.weights
    if weights in ("pretrained", "random"):
        return weights
    uri = storage.normalise(weights)
    if storage.is_local(uri):
        return uri
    name = hashlib.sha256(uri.encode()).hexdigest()[:12] + "-" + uri.rsplit("/", 1)[1]
    target = os.path.join(directory, name)
    if not os.path.exists(target):
        os.makedirs(directory, exist_ok=True)
        fs, path = storage.filesystem(uri, options)
        partial = f"{target}.{os.getpid()}.partial"
        fs.get_file(path, partial)
        os.replace(partial, target)
    return target
