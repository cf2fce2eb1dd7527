"""Damage that somebody meets who reads a store, and the one thing to do about it."""

from __future__ import annotations

import re

from pipelines.errors import JobError

_LOG_AND_FILE = r"(?:/_delta_log)?(?:/[^/]+)?"
_OF_A_RESULT = re.compile(rf"(.+)/(?:index/[^/]+|(?:clusters|parts|matches)/[^/]+/[^/]+){_LOG_AND_FILE}")
_OF_A_STORE = re.compile(rf"(.+)/(?:images|patches|failures|projection|transactions){_LOG_AND_FILE}")


def run_repair(store: str) -> str:
    """What to do about damage in a store, to end a sentence that names the file."""
    return f"run `dinoray repair {store}`, which mends what can be mended"


def store_of(uri: str) -> str:
    """The store that a table, or a file of one, lies in, as its path has it."""
    found = _OF_A_RESULT.fullmatch(uri) or _OF_A_STORE.fullmatch(uri)
    return found[1] if found else uri.rpartition("/")[0]


class DamagedLog(JobError):
    """The log of a table, or that of a store's transactions, is damaged, or is not of the state of the others."""


class DamagedResult(JobError):
    """A result of a job is there, and what it was made with is gone, or is another's."""


def gone(uri: str, store: str = "") -> str:
    """The sentence for a file that a table or an index names and that is not there: it may have been replaced at this
    moment, or be lost."""
    return (
        f"{uri} is gone: run the same command again, and `dinoray repair {store or store_of(uri)}` if it fails again."
    )


def damaged(uri: str, found: str, store: str = "") -> str:
    """The sentence for a file that is there and is not what was written. found: what its reader says."""
    return f"{uri} is damaged ({found}): {run_repair(store or store_of(uri))}."
