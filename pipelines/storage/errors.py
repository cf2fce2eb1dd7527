"""What went wrong with storage, in words: of drivers' own libraries, of delta-rs, of disks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from pipelines.errors import DinorayError, JobError
from pipelines.storage.filesystems import is_local


@contextlib.contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Errors of the storage drivers' own libraries as one sentence; they are not OSErrors.

    Raises JobError where the storage does not answer, or where there are no credentials.
    """
    try:
        yield
    except Exception as error:
        if not drivers_own(error):
            raise
        raise JobError(f"{uri} cannot be reached: {said(error)}. Check its endpoint and your credentials.") from None


def explain_failed_storage(error: Exception, uri: str = "The storage") -> JobError | None:
    """The sentence for an error of remote storage; None for anything else."""
    if isinstance(error, DinorayError) or not failed_storage(error):
        return None
    return JobError(
        f"{uri} could not be reached, or stopped answering: {said(error)}. What is committed stays: run the same "
        "command again."
    )


_DRIVER_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")
_SAID_BY_DELTA = re.compile(r"Generic (S3|GCS|\w*Azure\w*|HTTP) error|Error performing ")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# delta-rs appends one to some of its errors.
_OF_A_BACKTRACE = re.compile(r"\d+: \S+$|at \S+:\d+:\d+$")
MAX_QUOTED_CHARACTERS = 300


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
    text = ": ".join(line for line in lines if line and not _OF_A_BACKTRACE.match(line))
    return text[:MAX_QUOTED_CHARACTERS].rstrip(".: ") or type(error).__name__


def explain_read_error(error: Exception, uri: str) -> JobError | None:
    """What a failed read means in words, where it says nothing of the content: there is no permission, or the disk or
    the storage fails; None for anything else."""
    if isinstance(error, DinorayError | FileNotFoundError | NotADirectoryError):
        return None
    if isinstance(error, PermissionError) or "Permission denied" in str(error) or "AccessDenied" in str(error):
        where = "check the permissions" if is_local(uri) else "check the credentials and the bucket's policy"
        return JobError(f"{uri} cannot be read (permission denied): {where}.")
    if isinstance(error, OSError) and error.errno is not None:
        return JobError(f"{uri} cannot be read ({said(error)}): run the same command again when its storage works.")
    return explain_failed_storage(error, uri)


def explain_write_error(error: Exception, uri: str) -> JobError | None:
    """What a failed write means in words, for the causes that users meet; None for anything else."""
    text = str(error)
    if (isinstance(error, OSError) and error.errno == 28) or "No space left" in text or "StorageFull" in text:
        return JobError(f"The disk that holds {uri} is full: free some space and run the same command again.")
    if isinstance(error, PermissionError) or "Permission denied" in text or "AccessDenied" in text:
        where = "check the permissions" if is_local(uri) else "check the credentials and the bucket's policy"
        return JobError(f"{uri} cannot be written (permission denied): {where}.")
    if (isinstance(error, OSError) and error.errno == 30) or "Read-only file system" in text:
        return JobError(f"{uri} cannot be written: the file system is read-only.")
    return None
