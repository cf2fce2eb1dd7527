"""The extraction spec: what decides the values in a store, and nothing else.

A store has one spec for life. It is written to store.json with its fingerprint and compared on every run; weights
count by their content, so that moving a file changes nothing and overwriting one is noticed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipelines.settings.differences import differences
from pipelines.settings.sections import Config
from pipelines.store import weights

SECTIONS = ("model", "image", "features", "store")

# The machine decides these, not the spec: they change values by less than half precision keeps.
_NOT_IDENTITY = {"model": {"device", "compile"}}


def make_spec(config: Config) -> dict[str, Any]:
    """The spec of a configuration as plain JSON data. Raises RequestError for weights that do not exist."""
    settings = config.model_dump(mode="json", include=set(SECTIONS))
    for section, keys in _NOT_IDENTITY.items():
        for key in keys:
            del settings[section][key]
    settings["model"]["weights"] = weights.identity(config)
    # query and key facets are taken before rotary positions are applied
    settings["features"]["rope"] = "before"
    return settings


def fingerprint(spec: dict[str, Any]) -> str:
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def spec_differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """`section.key: the store has X, requested Y` for every setting in which two specs differ.

    A setting that the stored spec lacks is younger than the store, which was made as its default says.
    """
    defaults = _flat(Config().model_dump(mode="json", include=set(SECTIONS)))
    phrase = "{key}: the store has {before}, requested {asked}"
    return differences(_flat(stored), {**defaults, **_flat(asked)}, phrase, defaults=defaults)


def _flat(spec: dict[str, Any]) -> dict[str, str]:
    return {f"{section}.{key}": _show(value) for section, values in spec.items() for key, value in values.items()}


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:28]}...{text[-6:]}"
