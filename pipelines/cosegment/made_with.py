"""The settings that parts/NAME was made with."""

from __future__ import annotations

import json
from typing import Any

from pipelines import storage
from pipelines.cosegment.sets import source_of
from pipelines.errors import RequestError
from pipelines.results.parts import parts_uri
from pipelines.settings.sections import CosegmentSettings


def check_settings(store: str, name: str, asked: CosegmentSettings, options: storage.Options, *, record: bool) -> None:
    """Compare with the settings that NAME was made with; `record` writes them where there are none yet.

    Of `sets` the kind counts and not which file. Raises RequestError with the differences.
    """
    uri = storage.join(parts_uri(store, name), "settings.json")
    ours = _identity(asked)
    stored = storage.read_json(uri, options)
    if stored is None and record:
        storage.write_once(uri, json.dumps(ours, indent=2).encode(), options)
        stored = storage.read_json(uri, options)
    if stored is None:
        return
    stored = _identity(CosegmentSettings()) | stored  # a setting that the record lacks is younger than it
    differing = [
        f"cosegment.{key}: stored {json.dumps(stored.get(key))}, asked {json.dumps(ours.get(key))}"
        for key in sorted({*stored, *ours})
        if stored.get(key) != ours.get(key)
    ]
    if differing:
        raise RequestError(
            f"The parts {name} of {store} were made with other settings ({'; '.join(differing)}): give those again, or "
            "another NAME for these."
        )


def _identity(settings: CosegmentSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json") | {"sets": source_of(settings.sets)}
