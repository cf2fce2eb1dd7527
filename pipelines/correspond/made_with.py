"""The settings that matches/NAME was made with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipelines import storage
from pipelines.errors import RequestError
from pipelines.results.matches import matches_uri
from pipelines.settings.sections import CorrespondSettings

_NOT_IDENTITY = {"pairs", "tile_images"}  # what is matched and in which order, not how


def check_settings(store: str, name: str, asked: CorrespondSettings, options: storage.Options, *, record: bool) -> None:
    """Compare with the settings that NAME was made with; `record` writes them where there are none yet.

    Raises RequestError with the differences.
    """
    uri = storage.join(matches_uri(store, name), "settings.json")
    ours = asked.model_dump(mode="json", exclude=_NOT_IDENTITY)
    stored = storage.read_json(uri, options)
    if stored is None and record:
        storage.write_once(uri, json.dumps(ours, indent=2).encode(), options)
        stored = storage.read_json(uri, options)
    differing = list(_differences(stored, ours)) if stored else []
    if differing:
        raise RequestError(
            f"The matches {name} of {store} were made with other settings ({'; '.join(differing)}): give those again, "
            "or another NAME for these."
        )


def _differences(stored: dict[str, Any], asked: dict[str, Any]) -> Iterator[str]:
    # a setting that the record lacks is younger than it, which was made as its default says
    stored = CorrespondSettings().model_dump(mode="json", exclude=_NOT_IDENTITY) | stored
    for key in sorted({*stored, *asked}):
        if stored.get(key) != asked.get(key):
            old, new = json.dumps(stored.get(key)), json.dumps(asked.get(key))
            yield f"correspond.{key}: stored {old}, asked {new}"
