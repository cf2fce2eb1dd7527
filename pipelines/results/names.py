"""Results of jobs in a store lie in folders that users name: clusters/NAME, parts/NAME, matches/NAME, index/NAME."""

from __future__ import annotations

import re

from pipelines import storage
from pipelines.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Names of files and folders have at most 255 bytes, some of which are for what is written beside them.
MAX_NAME_LENGTH = 200


def result_uri(store: str, kind: str, name: str) -> str:
    """Where a result lies. Raises RequestError for a name that cannot be a folder's."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"NAME is {name!r}, but it names a folder: give letters, digits, `_`, `-` and `.`, such as animals-4."
        )
    if len(name) > MAX_NAME_LENGTH:
        raise RequestError(f"NAME has {len(name)} characters, {name[:20]}...: give at most {MAX_NAME_LENGTH}.")
    return storage.join(store, kind, name)


def result_names(store: str, kind: str, options: storage.Options) -> list[str]:
    """Names of folders that may hold a result of a kind, ascending."""
    fs, path = storage.filesystem(storage.join(store, kind), options)
    try:
        found = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [name for name in found if _NAME.fullmatch(name)]
