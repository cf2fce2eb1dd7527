"""The settings that matches/NAME has for life."""

from __future__ import annotations

from typing import Any

from pipelines import storage
from pipelines.results.made_with import MadeWith
from pipelines.settings.sections import CorrespondSettings

# They decide what is matched, and not how.
WHICH_AND_IN_WHAT_ORDER = {"pairs", "tile_images"}


def settings_of_matches(store: str, name: str, asked: CorrespondSettings, options: storage.Options) -> MadeWith:
    """What a run asks of matches/NAME."""
    return MadeWith(store, "matches", name, "correspond", _identity(asked), _identity(CorrespondSettings()), options)


def _identity(settings: CorrespondSettings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude=WHICH_AND_IN_WHAT_ORDER)
