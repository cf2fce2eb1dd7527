"""The settings that parts/NAME has for life."""

from __future__ import annotations

from typing import Any

from pipelines import storage
from pipelines.cosegment.sets import source_of
from pipelines.results.made_with import MadeWith
from pipelines.settings.sections import CosegmentSettings


def settings_of_parts(store: str, name: str, asked: CosegmentSettings, options: storage.Options) -> MadeWith:
    """What a run asks of parts/NAME. Of `sets` the kind counts, and not which file."""
    return MadeWith(store, "parts", name, "cosegment", _identity(asked), _identity(CosegmentSettings()), options)


def _identity(settings: CosegmentSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json") | {"sets": source_of(settings.sets)}
