"""Results of jobs in a store lie in folders that users name: clusters/NAME, parts/NAME, matches/NAME, index/NAME."""

from __future__ import annotations

import re
from typing import Literal

from pipelines import storage
from pipelines.errors import RequestError

Kind = Literal["clusters", "parts", "matches", "index"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_EXAMPLES: dict[Kind, str] = {"clusters": "words-100", "parts": "animals-4", "matches": "cats-knn", "index": "photos"}


def result_uri(store: str, kind: Kind, name: str) -> str:
    """Where a result lies. Raises RequestError for a name that cannot be a folder's."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"NAME is {name!r}, but it names a folder: give letters, digits, `_`, `-` and `.`, such as "
            f"{_EXAMPLES[kind]}."
        )
    return storage.join(store, kind, name)


def result_names(store: str, kind: Kind, options: storage.Options) -> list[str]:
    """Names of folders that may hold a result of a kind, ascending."""
    fs, path = storage.filesystem(storage.join(store, kind), options)
    try:
        found = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in found if _NAME.fullmatch(name)]
