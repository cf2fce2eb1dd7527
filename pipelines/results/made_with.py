"""The settings that a result was made with, which it has for life: settings.json beside its tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines import storage
from pipelines.errors import RequestError
from pipelines.jobs import JOBS
from pipelines.results.names import result_uri
from pipelines.settings.differences import differences
from pipelines.settings.sections import Section

_Settings = TypeVar("_Settings", bound=Section)


@dataclass(frozen=True)
class MadeWith:
    """KIND/NAME of a store, and the settings that a run asks for.

    section: of the settings. asked, defaults: the values that decide what the rows are, as plain data.
    """

    store: str
    kind: str
    name: str
    section: str
    asked: Mapping[str, Any]
    defaults: Mapping[str, Any]
    options: storage.Options

    @classmethod
    def of(
        cls,
        command: str,
        store: str,
        name: str,
        asked: _Settings,
        for_life: Callable[[_Settings], Mapping[str, Any]],
        options: storage.Options,
    ) -> MadeWith:
        """Of the result that a job leaves by NAME. asked: its section. for_life: what of a section the result keeps."""
        job = JOBS[command]
        return cls(store, job.makes, name, job.section, for_life(asked), for_life(type(asked)()), options)

    def check(self, *, record: bool = False) -> None:
        """Compare with the settings that the result was made with; `record` writes them where there are none yet.

        Raises RequestError with the differences.
        """
        uri = storage.join(result_uri(self.store, self.kind, self.name), "settings.json")
        stored = storage.read_json(uri, self.options)
        if stored is None and record:
            storage.write_once(uri, json.dumps(self.asked, indent=2).encode(), self.options)
            stored = storage.read_json(uri, self.options)
        if stored is None:
            return
        phrase = f"{self.section}.{{key}}: stored {{before}}, requested {{asked}}"
        differing = differences(_shown(stored), _shown(self.asked), phrase, defaults=_shown(self.defaults))
        if differing:
            raise RequestError(
                f"The {self.kind} {self.name} of {self.store} were made with other settings ({'; '.join(differing)}): "
                "give those again, or another NAME for these."
            )


def _shown(settings: Mapping[str, Any]) -> dict[str, str]:
    """Values as JSON has them."""
    return {key: json.dumps(value) for key, value in settings.items()}
