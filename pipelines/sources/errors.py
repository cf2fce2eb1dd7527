"""Errors that are shown to people, and what the libraries of storage drivers raise."""

from __future__ import annotations

import re

_DRIVER_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")
_SAID_BY_DELTA = re.compile(r"Generic (S3|GCS|\w*Azure\w*|HTTP) error|Error performing ")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LONGEST_SAID = 300  # characters of a library's message that a sentence of ours repeats


class InputError(ValueError):
    """INPUT is not what it should be: one sentence with what was asked, what was found and what to do."""


class StorageError(InputError):
    """The storage that INPUT lies on did not answer, or broke off: the same command may succeed later."""


def drivers_own(error: BaseException) -> bool:
    """Whether an error is of a storage driver's own library; such errors are not OSErrors."""
    return type(error).__module__.startswith(_DRIVER_LIBRARIES)


def failed_storage(error: BaseException | None) -> bool:
    """Whether remote storage did not answer, or broke off: the error of a driver's library, or what fsspec or delta-rs
    made of one. A file that is not there or may not be read is an answer."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
        return False
    while error is not None:
        if drivers_own(error) or isinstance(error, ConnectionError | TimeoutError):
            return True
        if _SAID_BY_DELTA.search(str(error)):
            return True
        error = error.__cause__
    return False


def said(error: BaseException) -> str:
    """What an error says, on one line and without its end stop, to be part of a sentence."""
    lines = [line.strip(" \t↳") for line in _COLOURS.sub("", str(error)).splitlines()]
    text = ": ".join(line for line in lines if line)
    return text[:LONGEST_SAID].rstrip(".: ") or type(error).__name__
