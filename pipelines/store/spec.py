"""The extraction spec: what decides the values in a store, and nothing else.

A store has one spec for life. It is written to store.json with its fingerprint and compared on every run; weights
count by their content, so that moving a file changes nothing and overwriting one is noticed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pipelines.settings.sections import Config
from pipelines.store import weights

SECTIONS = ("model", "image", "features", "store")

# Decided by the machine at hand, not by the spec: they move values by less than half precision keeps.
_NOT_IDENTITY = {"model": {"device", "compile"}}


def make_spec(config: Config) -> dict[str, Any]:
    """The spec of a configuration as plain JSON data. Raises RequestError for weights that do not exist."""
    settings = config.model_dump(mode="json", include=set(SECTIONS))
    for section, keys in _NOT_IDENTITY.items():
        for key in keys:
            del settings[section][key]
    settings["model"]["weights"] = weights.identity(config)
    settings["features"]["rope"] = "before"  # query and key facets are taken before rotary positions are applied
    return settings


def fingerprint(spec: dict[str, Any]) -> str:
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def differences(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """`section.key: stored X, asked Y` for every setting in which two specs differ.

    A setting that the stored spec lacks is younger than the store, which was made as its default says.
    """
    defaults = Config().model_dump(mode="json", include=set(SECTIONS))
    lines = []
    for section in sorted({*stored, *asked}):
        old = defaults.get(section, {}) | stored.get(section, {})
        new = defaults.get(section, {}) | asked.get(section, {})
        lines += [
            f"{section}.{key}: the store has {_show(old.get(key))}, asked was {_show(new.get(key))}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
    return lines


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:28]}...{text[-6:]}"
